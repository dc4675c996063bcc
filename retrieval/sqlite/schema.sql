-- store.sqlite3, format 2: the whole truth about a store. Everything else in its folder can be deleted.
PRAGMA application_id = 0x716C6F72;  -- "qlor", so that file(1) and this code can tell it from other SQLite files

-- format_version, embedder_id, dim (empty until the first vector), metric, chunk_size, chunk_overlap,
-- counter (what counts the tokens of a chunk), documents, chunks (how many there are: a row that is lost is noticed),
-- change_seq (grows with every commit: caches compare it), index_sha256 (the HNSW file to trust; empty: none).
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

-- Every row carries a checksum (CRC-32 of its other columns, records.py), so that damage on the disk is an error and
-- not another text.
CREATE TABLE documents (
    id         INTEGER PRIMARY KEY,
    uri        TEXT NOT NULL UNIQUE,
    sha256     TEXT NOT NULL,     -- of the source's bytes
    metadata   TEXT NOT NULL,     -- JSON object
    characters INTEGER NOT NULL,  -- of the whole text, in code points
    checksum   INTEGER NOT NULL
);

-- A document's text in parts of 16,384 code points: a hit reads the part it lies in, and not 6 MB.
CREATE TABLE texts (
    document_id INTEGER NOT NULL REFERENCES documents (id) ON DELETE CASCADE,
    part        INTEGER NOT NULL,                   -- 0, 1, ...
    text        TEXT NOT NULL,
    checksum    INTEGER NOT NULL,
    UNIQUE (document_id, part)
);

-- A chunk's text is the document's [start_char:end_char], in code points; it is not stored a second time.
CREATE TABLE chunks (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,  -- AUTOINCREMENT: an id is never used again, so that any set of
                                                    -- ids a cache has seen can shrink but never change its meaning
    document_id INTEGER NOT NULL REFERENCES documents (id) ON DELETE CASCADE,
    ordinal     INTEGER NOT NULL,                   -- 0, 1, ... inside the document
    start_char  INTEGER NOT NULL,
    end_char    INTEGER NOT NULL,
    checksum    INTEGER NOT NULL,
    UNIQUE (document_id, ordinal),
    CHECK (0 <= start_char AND start_char < end_char)
);

-- Apart from chunks, so that scanning ids does not read vectors.
CREATE TABLE vectors (
    chunk_id INTEGER PRIMARY KEY REFERENCES chunks (id) ON DELETE CASCADE,
    vector   BLOB NOT NULL,                         -- dim little-endian float32, as the embedder returned them
    checksum INTEGER NOT NULL
);
