"""The keys of template fragments."""

from __future__ import annotations

from hashlib import sha256


def fragment_key(name: str, *vary_on: object) -> str:
    """The key under which ``{% cached %}`` keeps a fragment, to delete it by hand.

    Each value goes in with its length, so that no two lists of values share a key, as they can
    where a separator may be part of a value (``make_template_fragment_key``: ``"a:b"``, ``"c"`` and
    ``"a"``, ``"b:c"``).

    Args:
        name: of the fragment, as it stands in the tag.
        vary_on: the values after it; their text counts.
    """
    digest = sha256()
    for value in vary_on:
        text = str(value).encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(text))
        digest.update(text)
    return f"pgnotify.fragment.{name}.{digest.hexdigest()}"
