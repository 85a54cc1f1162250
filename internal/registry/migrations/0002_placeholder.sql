-- Stands in for the columns that the bench's migration makes.
ALTER TABLE devices ADD COLUMN station TEXT NOT NULL DEFAULT '';
ALTER TABLE devices ADD COLUMN flashed BIGINT NOT NULL DEFAULT 0;
