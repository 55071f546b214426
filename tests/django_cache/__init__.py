"""Django's own tests of its cache backends, run on ours.

They are in Django's source distribution only, so :mod:`.source` fetches that with pip, once for
each version. :mod:`.run` is the program that runs them, :mod:`.suites` says on what, and which
of them do not fit, and why.
"""
