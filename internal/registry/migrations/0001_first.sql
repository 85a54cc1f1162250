-- Times are unix milliseconds, 0 = never. Device ids are their 32-bit number.
-- 64-bit unsigned numbers are stored as the signed number of the same bits.

CREATE TABLE meta (
  one         INTEGER PRIMARY KEY CHECK (one = 1),
  fleet       BLOB    NOT NULL CHECK (length(fleet) = 16),
  created     BIGINT  NOT NULL,
  epoch       BIGINT  NOT NULL,
  start       BIGINT  NOT NULL, -- number of the last start of the server
  started     BIGINT  NOT NULL,
  checkpoint  BIGINT  NOT NULL  -- log position
);

CREATE TABLE devices (
  id          INTEGER PRIMARY KEY,
  class       TEXT    NOT NULL,
  state       TEXT    NOT NULL CHECK (state IN ('active','revoked','quarantined','retired')),
  key_hash    BLOB    UNIQUE CHECK (length(key_hash) = 32),
  created     BIGINT  NOT NULL,
  enrolled    BIGINT  NOT NULL,
  last_seen   BIGINT  NOT NULL,
  reason      TEXT    NOT NULL,
  note        TEXT    NOT NULL,
  last_cid    BIGINT  NOT NULL,
  hello_at       BIGINT NOT NULL DEFAULT 0, -- 0 = no hello yet
  hello_class    TEXT   NOT NULL DEFAULT '',
  hello_firmware TEXT   NOT NULL DEFAULT '',
  hello_image    BLOB,
  hello_tls      TEXT   NOT NULL DEFAULT '',
  hello_boot     TEXT   NOT NULL DEFAULT '',
  hello_nonce    BIGINT NOT NULL DEFAULT 0,
  hello_features TEXT   NOT NULL DEFAULT '[]', -- JSON array of texts
  hello_encoding TEXT   NOT NULL DEFAULT ''
);
CREATE INDEX devices_state ON devices (state, id);
CREATE INDEX devices_class ON devices (class, id);

CREATE TABLE device_tags (
  device INTEGER NOT NULL REFERENCES devices (id),
  tag    TEXT    NOT NULL,
  PRIMARY KEY (tag, device)
) WITHOUT ROWID;
CREATE INDEX device_tags_device ON device_tags (device);

CREATE TABLE csrs (
  device INTEGER PRIMARY KEY REFERENCES devices (id),
  der    BLOB    NOT NULL,
  at     BIGINT  NOT NULL
);

CREATE TABLE certificates (
  fingerprint BLOB   PRIMARY KEY CHECK (length(fingerprint) = 32),
  kind        TEXT   NOT NULL CHECK (kind IN ('device','service')),
  name        TEXT   NOT NULL,
  generation  BIGINT NOT NULL,
  der         BLOB   NOT NULL,
  not_before  BIGINT NOT NULL,
  not_after   BIGINT NOT NULL,
  state       TEXT   NOT NULL CHECK (state IN ('active','superseded','revoked')),
  at          BIGINT NOT NULL
);
CREATE UNIQUE INDEX certificates_active ON certificates (kind, name, generation) WHERE state = 'active';
CREATE INDEX certificates_end ON certificates (not_after) WHERE state = 'active';
CREATE INDEX certificates_name ON certificates (kind, name);

CREATE TABLE services (
  name    TEXT   PRIMARY KEY,
  state   TEXT   NOT NULL CHECK (state IN ('active','revoked')),
  reason  TEXT   NOT NULL,
  created BIGINT NOT NULL
);

CREATE TABLE grants (
  service TEXT NOT NULL REFERENCES services (name),
  mode    TEXT NOT NULL CHECK (mode IN ('read','write')),
  filter  TEXT NOT NULL,
  PRIMARY KEY (service, mode, filter)
) WITHOUT ROWID;

CREATE TABLE commands (
  device     INTEGER NOT NULL REFERENCES devices (id),
  cid        BIGINT  NOT NULL,
  name       TEXT    NOT NULL,
  args       BLOB,
  created_by TEXT    NOT NULL,
  created    BIGINT  NOT NULL,
  expires    BIGINT  NOT NULL,
  state      TEXT    NOT NULL CHECK (state IN ('queued','delivered','answered','failed','expired','cancelled','unknown')),
  delivered  BIGINT  NOT NULL,
  finished   BIGINT  NOT NULL,
  status     INTEGER NOT NULL,
  result     BLOB,
  PRIMARY KEY (device, cid)
) WITHOUT ROWID;
CREATE INDEX commands_state ON commands (state, device, cid);
CREATE INDEX commands_expires ON commands (expires) WHERE expires > 0 AND state IN ('queued','delivered');

CREATE TABLE configs (
  device          INTEGER PRIMARY KEY REFERENCES devices (id),
  version         BIGINT  NOT NULL, -- 0 = none desired yet
  document        BLOB,
  at              BIGINT  NOT NULL,
  applied_version BIGINT  NOT NULL,
  applied_status  INTEGER NOT NULL,
  applied_text    TEXT    NOT NULL,
  applied_at      BIGINT  NOT NULL
);

CREATE TABLE sessions (
  no            INTEGER PRIMARY KEY,
  kind          INTEGER NOT NULL,
  name          TEXT    NOT NULL,
  client        TEXT    NOT NULL,
  generation    BIGINT  NOT NULL,
  version       INTEGER NOT NULL,
  expiry        BIGINT  NOT NULL, -- seconds; 4294967295 = never
  created       BIGINT  NOT NULL,
  disconnected  BIGINT  NOT NULL, -- 0 = connected
  queue_cursor  BIGINT  NOT NULL, -- log position (services)
  queue_acked   BIGINT  NOT NULL, -- queue sequence (devices)
  dropped       BIGINT  NOT NULL,
  will_topic    TEXT,             -- null = no will
  will_payload  BLOB,
  will_qos      INTEGER NOT NULL DEFAULT 0,
  will_retain   INTEGER NOT NULL DEFAULT 0,
  will_delay    BIGINT  NOT NULL DEFAULT 0,
  will_expiry   BIGINT  NOT NULL DEFAULT -1, -- seconds; -1 = none
  will_props    BLOB,
  will_due      BIGINT  NOT NULL DEFAULT 0,
  UNIQUE (kind, name, client)
);

CREATE TABLE subscriptions (
  session INTEGER NOT NULL REFERENCES sessions (no) ON DELETE CASCADE,
  filter  TEXT    NOT NULL,
  options INTEGER NOT NULL, -- the byte on the wire, MQTT 5.0 3.8.3.1
  sub_id  BIGINT  NOT NULL, -- 0 = none
  start   BIGINT  NOT NULL, -- log position
  PRIMARY KEY (session, filter)
) WITHOUT ROWID;

CREATE TABLE inflight (
  session INTEGER NOT NULL REFERENCES sessions (no) ON DELETE CASCADE,
  packet  INTEGER NOT NULL,
  ref     BIGINT  NOT NULL, -- log position (services) or queue sequence (devices)
  state   INTEGER NOT NULL,
  PRIMARY KEY (session, packet)
) WITHOUT ROWID;

CREATE TABLE inbound_qos2 (
  session INTEGER PRIMARY KEY REFERENCES sessions (no) ON DELETE CASCADE,
  packets BLOB NOT NULL -- big-endian u16 each
);

CREATE TABLE streams (
  name     TEXT   PRIMARY KEY,
  first    BIGINT NOT NULL,
  last     BIGINT NOT NULL,
  frame    BIGINT NOT NULL,
  checksum BIGINT NOT NULL
);

CREATE TABLE requests (
  id      TEXT   PRIMARY KEY,
  kind    TEXT   NOT NULL,
  subject TEXT   NOT NULL,
  body    BLOB   NOT NULL,
  at      BIGINT NOT NULL,
  state   TEXT   NOT NULL CHECK (state IN ('pending','done','refused'))
);
CREATE INDEX requests_state ON requests (state, at);

CREATE TABLE audit (
  no      INTEGER PRIMARY KEY,
  at      BIGINT NOT NULL,
  actor   TEXT   NOT NULL,
  action  TEXT   NOT NULL,
  subject TEXT   NOT NULL,
  detail  TEXT   NOT NULL -- JSON object
);
CREATE INDEX audit_subject ON audit (subject, no);
CREATE INDEX audit_at ON audit (at, no);
