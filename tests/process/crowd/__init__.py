"""A site whose every visitor is in one group: what many websockets are tested on."""
