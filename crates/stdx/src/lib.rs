//! Clock, seeded randomness, backoff, bounded queue, error-chain printer.
