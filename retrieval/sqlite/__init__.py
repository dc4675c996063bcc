"""The durable part of a store: schema, database file, records, the writer lock."""
