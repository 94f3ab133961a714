"""The order of additions, recovered from outside: trees from probes, their names, their replay."""
