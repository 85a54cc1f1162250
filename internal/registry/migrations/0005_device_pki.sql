CREATE TABLE anchor_sets (
  sequence INTEGER PRIMARY KEY,
  cose     BLOB    NOT NULL,
  offered  INTEGER NOT NULL CHECK (offered IN (0, 1)), -- 0 = kept back by an abort
  at       BIGINT  NOT NULL
);

-- What a device uses. fingerprint: of the certificate of its last admitted connection.
-- anchors: the set it last proved, or was born with. pending: a set it stores unproven, 0 = none.
CREATE TABLE device_pki (
  device      INTEGER PRIMARY KEY REFERENCES devices (id),
  fingerprint BLOB    CHECK (length(fingerprint) = 32),
  anchors     BIGINT  NOT NULL,
  pending     BIGINT  NOT NULL,
  at          BIGINT  NOT NULL
);
CREATE INDEX device_pki_anchors ON device_pki (anchors);

INSERT INTO device_pki (device, anchors, pending, at) SELECT id, 1, 0, 0 FROM devices;
