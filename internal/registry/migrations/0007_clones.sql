-- The last boots of each device, by the nonce of its hello, and where it was said.
CREATE TABLE boots (
  device INTEGER NOT NULL REFERENCES devices (id),
  nonce  BIGINT  NOT NULL,
  remote TEXT    NOT NULL, -- address and port; '' = not known
  at     BIGINT  NOT NULL,
  pos    BIGINT  NOT NULL, -- log position of the hello
  PRIMARY KEY (device, nonce)
) WITHOUT ROWID;

-- Two boots of one device that were both alive: it came back to the first after
-- the second. Rows go when an administrator has settled the matter.
CREATE TABLE clones (
  device        INTEGER NOT NULL REFERENCES devices (id),
  nonce         BIGINT  NOT NULL, -- came back
  remote        TEXT    NOT NULL,
  other         BIGINT  NOT NULL, -- was heard in between
  other_remote  TEXT    NOT NULL,
  other_at      BIGINT  NOT NULL,
  at            BIGINT  NOT NULL,
  PRIMARY KEY (device, nonce, other)
) WITHOUT ROWID;
