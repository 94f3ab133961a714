"""How two groups of four warps add up one row in turn: what one hands on to the other, in PTX.

A thread has one lane and hands it to the thread of the other group that has the same. Nobody else
is waited for; with stores and loads that Triton knows of, the warps of a group would be.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from batch_invariant_cuda.cluster import LINE, WIDTH

_SIZE = gl.constexpr(4 * WIDTH.value)  # bytes of what a group hands on
BYTES = -(-2 * (_SIZE.value + 8) // 128) * 128  # of all, as in cluster.py a multiple of 128


@gluon.constexpr_function
def _opening():
    size, threads = _SIZE.value, WIDTH.value
    return f"""{{
        .shared .align 128 .b8 turns[{BYTES}];
        .reg .b32 thread;
        .reg .pred first;
        mov.u32 $0, turns;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first mbarrier.init.shared::cta.b64 [$0 + {2 * size}], {threads};
        @first mbarrier.init.shared::cta.b64 [$0 + {2 * size + 8}], {threads}; }}"""


@gluon.constexpr_function
def _taking(group):
    """$0: a lane. $1: its number. $2: the address. $3: the parity of the other group's turn."""
    size = _SIZE.value
    return f"""{{
        .reg .b32 from;
        .reg .pred here;
        AGAIN: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64
            here, [$2 + {2 * size + 8 * (1 - group)}], $3;
        @!here bra AGAIN;
        mad.lo.u32 from, $1, 4, $2;
        ld.shared.f32 $0, [from + {size * (1 - group)}]; }}"""


@gluon.constexpr_function
def _handing_on(group):
    """$1: the number of a lane. $2: the address. $3: the lane."""
    size = _SIZE.value
    return f"""{{
        .reg .b32 to;
        mad.lo.u32 to, $1, 4, $2;
        st.shared.f32 [to + {size * group}], $3;
        mbarrier.arrive.release.cta.shared::cta.b64 _, [$2 + {2 * size + 8 * group}];
        mov.f32 $0, $3; }}"""


@gluon.jit
def open_turns():
    """The address of room and barriers for both groups. Before the first turn all have to meet."""
    steps: gl.constexpr = _opening()
    return gl.inline_asm_elementwise(steps, "=r", [], gl.int32, False, 1)


@gluon.jit
def take(turns, turn, GROUP: gl.constexpr):
    """The [WIDTH] lanes that the other group hands on before a turn, as they are counted from 0.

    Group 0 has the even turns, group 1 the odd ones. Before turn 0 nothing was handed on, and what
    is returned means nothing.
    """
    lane = gl.arange(0, WIDTH, LINE)
    steps: gl.constexpr = _taking(GROUP)
    parity = turn // 2 & 1 ^ (1 - GROUP)
    return gl.inline_asm_elementwise(
        steps, "=&f,r,r,r", [lane, lane * 0 + turns, lane * 0 + parity], gl.float32, False, 1
    )


@gluon.jit
def hand_on(lanes, turns, GROUP: gl.constexpr):
    """Ends a turn. What a group hands on is taken before it has the turn after the next."""
    lane = gl.arange(0, WIDTH, LINE)
    steps: gl.constexpr = _handing_on(GROUP)
    gl.inline_asm_elementwise(
        steps, "=f,r,r,f", [lane, lane * 0 + turns, lanes], gl.float32, False, 1
    )
