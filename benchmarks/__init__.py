"""Benchmarks made from the op registry: ``python -m benchmarks``, or ``pytest benchmarks``.

``cases`` says what is measured, ``subjects`` and ``peers`` who takes part, ``measure`` how,
``report``, ``tables`` and ``plots`` what comes of it.
"""
