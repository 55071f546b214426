"""Sphinx configuration: MyST pages, the furo theme, the API read from the code."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import django
from django.conf import settings

if not settings.configured:
    # Nothing connects: the alias only has to look as if one could.
    settings.configure(
        DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "NAME": "docs"}},
        INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "django_pgnotify"],
        SECRET_KEY="of the documentation",
        USE_TZ=True,
    )
    django.setup()

import django_pgnotify

project = "django-pgnotify"
author = copyright = "The django-pgnotify authors"
release = version = django_pgnotify.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"django-pgnotify {release}"
html_show_copyright = False
