"""Code under torch.compile does not leave the mode: it runs eagerly while the mode is on."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def test_compiled_functions_keep_the_promise_and_are_compiled_again_afterwards() -> None:
    # Its own process: Dynamo must not have been imported when the mode is turned on.
    script = """
    import sys, torch, batch_invariant as bi

    compiled = []

    def backend(graph, inputs):
        compiled.append(1)
        return graph.forward

    def f(x, w):
        return x @ w

    x, w = torch.randn(64, 1024), torch.randn(1024, 96)
    bi.enable()
    assert "torch._dynamo" not in sys.modules
    g = torch.compile(f, backend=backend)
    assert torch.equal(g(x, w), bi.mm(x, w)) and not compiled
    assert torch.equal(g(x[:1].clone(), w), g(x, w)[:1])
    bi.disable()
    g(x, w)
    assert compiled == [1]
    with bi.enabled():      # compiled before the mode was turned on
        assert torch.equal(g(x, w), bi.mm(x, w))
    assert compiled == [1]
    assert torch._dynamo.eval_frame._stance.stance == "default"
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
