"""Turns raw web metadata and face data sets into the shards that training reads."""
