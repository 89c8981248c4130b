"""The contract between storage and everything that presents it. Standard library only.

``contract`` says what storage is, ``stack`` is the one place that checks it, ``native`` how C may serve it without
Python, ``options`` and ``source`` how a user names it, ``errors`` what goes wrong, ``threads`` and ``linux`` help
to write backends. Import the modules, not this package.
"""
