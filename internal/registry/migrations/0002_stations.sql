-- Flashing benches: who they are, the ids they were given, and how far their journals were read.

CREATE TABLE stations (
  name     TEXT   PRIMARY KEY,
  state    TEXT   NOT NULL CHECK (state IN ('active','revoked')),
  reason   TEXT   NOT NULL,
  key_hash BLOB   NOT NULL CHECK (length(key_hash) = 32), -- of the key in force
  csr      BLOB   NOT NULL, -- DER, of that key
  created  BIGINT NOT NULL,
  lines    BIGINT NOT NULL, -- of its journal that were imported
  head     BLOB   NOT NULL CHECK (length(head) = 32), -- SHA-256 of the last of them
  imported BIGINT NOT NULL  -- when that was
);

-- All that were ever issued: a unit is judged by the one in force when it was made.
CREATE TABLE station_certificates (
  fingerprint BLOB   PRIMARY KEY CHECK (length(fingerprint) = 32),
  station     TEXT   NOT NULL REFERENCES stations (name),
  key_hash    BLOB   NOT NULL CHECK (length(key_hash) = 32),
  generation  BIGINT NOT NULL, -- of the device CA above it
  der         BLOB   NOT NULL,
  not_before  BIGINT NOT NULL,
  not_after   BIGINT NOT NULL,
  at          BIGINT NOT NULL
);
CREATE INDEX station_certificates_station ON station_certificates (station, not_after);

CREATE TABLE station_blocks (
  id      BLOB   PRIMARY KEY CHECK (length(id) = 16),
  station TEXT   NOT NULL REFERENCES stations (name),
  count   BIGINT NOT NULL,
  anchors BIGINT NOT NULL, -- number of the set that its units are born with
  created BIGINT NOT NULL,
  expires BIGINT NOT NULL,
  signed  BIGINT NOT NULL  -- 0 = waits for the safe
);
CREATE INDEX station_blocks_station ON station_blocks (station, created);

-- Ids that were given to a bench. A row stays for ever: no id is handed out twice.
CREATE TABLE reserved_ids (
  id    INTEGER PRIMARY KEY,
  block BLOB NOT NULL REFERENCES station_blocks (id),
  state TEXT NOT NULL CHECK (state IN ('free','used','burnt'))
);
CREATE INDEX reserved_ids_block ON reserved_ids (block, state);
