"""The theory as executable checks: problems, closed forms, certificates, verdicts and maps; no models."""
