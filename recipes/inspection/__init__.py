"""What a folder holds: a model, an adapter, a run, a store, rows."""
