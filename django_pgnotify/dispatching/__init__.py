"""From decoded events to calls of receivers: lanes, limits, order, retries."""
