"""The node's epoch table: what every process of a node can read to know that a value is stale."""
