//! What every crate needs and no domain owns: clock, seeded randomness, backoff, bounded queue, shutdown, error chains.
//!
//! Nothing here knows Kubernetes or does IO. Time and randomness come through these types so that a whole system can
//! run under a paused clock with one seed.

pub mod backoff;
pub mod clock;
pub mod error;
pub mod queue;
pub mod rng;
pub mod shutdown;

pub use backoff::{Backoff, BackoffPolicy};
pub use clock::{Clock, ManualClock, RealClock, RuntimeClock, SharedClock};
pub use error::chain;
pub use rng::Rng;
pub use shutdown::{Shutdown, TaskGroup};
