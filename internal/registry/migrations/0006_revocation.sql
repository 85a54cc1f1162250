-- What a revoked certificate was before: what unrevoke gives back. '' = it was
-- revoked before this was remembered, or is not revoked.
ALTER TABLE certificates ADD COLUMN was TEXT NOT NULL DEFAULT '' CHECK (was IN ('','active','superseded'));
