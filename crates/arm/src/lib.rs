//! The ARM front door: ids, envelopes, dated versions, long-running operations, tokens.
