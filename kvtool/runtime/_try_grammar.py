"""Compiles a grammar from stdin within few seconds and little memory, or is killed.

A script for a process of its own, which imports nothing of the package and so starts at once.
"""

import sys

from llguidance import LLMatcher, LLTokenizer

_SECONDS, _BYTES = 2, 2**30

if __name__ == "__main__":
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    matcher = LLMatcher(LLTokenizer("byte"), sys.stdin.buffer.read().decode(), log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
