//! Container groups: the engine side, quotas, meter.
