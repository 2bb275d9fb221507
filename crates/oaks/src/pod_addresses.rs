//! How many pods a machine has addresses for, as the wire server tells: one more configuration of its NIC is one more pod.

use std::time::Duration;

use stdx::Shutdown;
use tokio::sync::watch;

/// The plug-in asks at this address too.
const WIRE_SERVER: &str = "http://168.63.129.16";
const TIMEOUT_MS: u64 = 2000;
/// How long a new address may go unnoticed.
const INTERVAL: Duration = Duration::from_secs(5);

/// Asks now and then, until shutdown. `planned` holds until the wire server has answered, and whenever it does not.
pub fn follow(planned: i64, shutdown: Shutdown) -> watch::Receiver<i64> {
    let (limit, receiver) = watch::channel(planned);
    tokio::spawn(async move {
        loop {
            let asked = tokio::task::spawn_blocking(|| cni::wire::ask(WIRE_SERVER, TIMEOUT_MS)).await;
            match asked {
                Ok(Ok(subnets)) => {
                    let count: usize = subnets.iter().map(|s| s.addresses.len()).sum();
                    let count = i64::try_from(count).unwrap_or(i64::MAX);
                    let changed = limit.send_if_modified(|now| std::mem::replace(now, count) != count);
                    if changed {
                        tracing::info!(pods = count, "the machine has addresses for so many pods");
                    }
                }
                // While the host agent is away nothing changes.
                Ok(Err(e)) => {
                    tracing::debug!(error = %stdx::chain(&e), "the wire server does not say how many addresses there are")
                }
                Err(_) => {}
            }
            if shutdown.or_stop(tokio::time::sleep(INTERVAL)).await.is_none() {
                return;
            }
        }
    });
    receiver
}
