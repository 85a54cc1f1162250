-- Where a device was made. '' and 0 = it did not come from a bench.
ALTER TABLE devices ADD COLUMN station TEXT NOT NULL DEFAULT '';
ALTER TABLE devices ADD COLUMN hardware BIGINT NOT NULL DEFAULT 0;
ALTER TABLE devices ADD COLUMN flashed BIGINT NOT NULL DEFAULT 0;
ALTER TABLE devices ADD COLUMN block BLOB;
CREATE INDEX devices_station ON devices (station, flashed) WHERE station <> '';
