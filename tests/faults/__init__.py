"""``make faults``: servers, connections and processes are broken at random, and every number of a
publisher that never rests is accounted for. ``run.py`` is the command, ``checker.py`` the judge."""
