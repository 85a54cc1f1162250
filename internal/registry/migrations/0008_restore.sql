-- What a restore from a backup leaves behind.
ALTER TABLE meta ADD COLUMN backup_of   BIGINT  NOT NULL DEFAULT 0; -- when the backup was taken that this registry comes from
ALTER TABLE meta ADD COLUMN restored    BIGINT  NOT NULL DEFAULT 0; -- when it was restored
ALTER TABLE meta ADD COLUMN restore_due INTEGER NOT NULL DEFAULT 0; -- 1: the next start begins a new epoch
ALTER TABLE meta ADD COLUMN requeue     BIGINT  NOT NULL DEFAULT 0; -- first frame whose queue messages may be missing; 0 = none are

-- Devices that know more than this registry, or are not in it: one row for each
-- and kind.
CREATE TABLE ahead (
  device INTEGER NOT NULL,
  kind   TEXT    NOT NULL CHECK (kind IN ('certificate','command','config','anchors')),
  detail TEXT    NOT NULL, -- fingerprint in hex, command id, version, sequence
  der    BLOB,             -- of a certificate
  at     BIGINT  NOT NULL,
  PRIMARY KEY (device, kind)
) WITHOUT ROWID;
