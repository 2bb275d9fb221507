//! Client over a tower service, informer store of bytes, keyed queue, plan executor.
