-- Device CA generations, and the moves of the fleet from one to the next or to other broker roots.

CREATE TABLE generations (
  number INTEGER PRIMARY KEY,
  ca     BLOB   NOT NULL, -- DER
  state  TEXT   NOT NULL CHECK (state IN ('active','retired')),
  at     BIGINT NOT NULL
);

CREATE TABLE rollovers (
  no              INTEGER PRIMARY KEY,
  open            INTEGER UNIQUE CHECK (open = 1), -- null = ended: at most one is open
  from_generation BIGINT NOT NULL, -- 0 = the generation stays
  to_generation   BIGINT NOT NULL,
  from_anchors    BIGINT NOT NULL, -- 0 = the anchors stay
  to_anchors      BIGINT NOT NULL,
  state           TEXT   NOT NULL CHECK (state IN ('planned','signing','signed','moving','retired','aborted')),
  started         BIGINT NOT NULL,
  moving          BIGINT NOT NULL, -- since when devices get offers
  ended           BIGINT NOT NULL,
  actor           TEXT   NOT NULL
);

-- How far each device has come. No row: nothing was offered yet. That a device has
-- arrived stands in device_pki, not here.
CREATE TABLE rollover_devices (
  rollover INTEGER NOT NULL REFERENCES rollovers (no),
  device   INTEGER NOT NULL REFERENCES devices (id),
  state    TEXT    NOT NULL CHECK (state IN ('offered','installed','failed')),
  reason   TEXT    NOT NULL,
  at       BIGINT  NOT NULL,
  PRIMARY KEY (rollover, device)
) WITHOUT ROWID;

CREATE INDEX certificates_generation ON certificates (generation, name) WHERE kind = 'device' AND state = 'active';
