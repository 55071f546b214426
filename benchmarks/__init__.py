"""What the bus costs and how fast it is, beside what else one could use, measured in one run.

``frame.py`` says what a scenario is, ``running.py`` runs its variants interleaved, ``report.py``
writes what came out. Each module of ``scenarios/`` is one scenario.
"""
