"""A site that shows events: streams, a websocket, and a page with the JavaScript module."""
