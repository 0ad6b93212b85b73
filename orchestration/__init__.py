"""The driver: configuration, controller loop, staleness slots, run state, tracking, CLI."""
