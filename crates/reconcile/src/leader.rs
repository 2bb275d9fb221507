//! Leader election by a Lease, so that of several processes one runs the controllers.
//!
//! The protocol is that of client-go's `leaderelection` (tools/leaderelection, v0.36): a candidate takes a Lease that has
//! no holder or was not renewed for its duration since *this process* saw it change (clocks of others are not compared);
//! a leader that could not renew for two thirds of it stops before another one starts.
//!
//! Leadership saves work, it is no lock: controllers act from state with preconditions, and two for a moment do no harm.

use std::time::Duration;

use apimachinery::time;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use stdx::{SharedClock, Shutdown};
use tokio::time::Instant;

use crate::{Client, Error};

/// Which Lease, and how fast it changes hands.
#[derive(Clone, Debug)]
pub struct Election {
    pub namespace: String,
    pub name: String,
    /// Unlike that of every other candidate, and of this one's earlier lives.
    pub identity: String,
    /// How long a leader that was not heard of stays leader. At least 1 s: the Lease counts seconds.
    pub duration: Duration,
}

impl Election {
    /// An election with a duration of 6 s: leaders renew every 1.5 s and give up after 4 s.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>, identity: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
            identity: identity.into(),
            duration: Duration::from_secs(6),
        }
    }

    fn give_up_after(&self) -> Duration {
        self.duration * 2 / 3
    }

    fn retry_every(&self) -> Duration {
        self.duration / 4
    }
}

/// What a candidate has seen of the Lease.
struct Seen {
    resource_version: String,
    at: Instant,
}

/// Campaigns until `shutdown`. Each time this process becomes leader, `start` gets a shutdown that is triggered when it no
/// longer is. At the end the Lease is given back, so that the next leader need not wait.
pub async fn lead(
    client: Client,
    election: Election,
    clock: SharedClock,
    shutdown: Shutdown,
    mut start: impl FnMut(Shutdown) + Send,
) {
    let mut seen = None;
    let mut leading: Option<(Shutdown, Instant)> = None;
    while !shutdown.is_triggered() {
        let began = Instant::now();
        let attempt = take_or_renew(&client, &election, &clock, &mut seen);
        let patience = election.give_up_after() / 2;
        let outcome = tokio::time::timeout(patience, attempt).await;
        match outcome {
            Ok(Ok(true)) => match &mut leading {
                Some((_, renewed)) => *renewed = began,
                None => {
                    tracing::info!(lease = election.name, identity = election.identity, "leading");
                    let term = shutdown.child();
                    start(term.clone());
                    leading = Some((term, began));
                }
            },
            Ok(Ok(false)) => stop(&election, leading.take(), "another process took the lease"),
            Ok(Err(error)) => {
                tracing::debug!(lease = election.name, %error, "asking for the lease failed");
            }
            Err(_) => tracing::debug!(lease = election.name, "asking for the lease took too long"),
        }
        if let Some((_, renewed)) = &leading
            && renewed.elapsed() >= election.give_up_after()
        {
            stop(&election, leading.take(), "the lease could not be renewed in time");
        }
        shutdown.or_stop(tokio::time::sleep(election.retry_every())).await;
    }
    if let Some((term, _)) = leading {
        term.trigger();
        let giving_back = give_back(&client, &election);
        if tokio::time::timeout(Duration::from_secs(1), giving_back).await.is_err() {
            tracing::debug!(lease = election.name, "giving the lease back took too long");
        }
    }
}

fn stop(election: &Election, leading: Option<(Shutdown, Instant)>, reason: &str) {
    if let Some((term, _)) = leading {
        tracing::warn!(
            lease = election.name,
            identity = election.identity,
            reason,
            "no longer leading"
        );
        term.trigger();
    }
}

/// Whether this process holds the Lease now.
async fn take_or_renew(
    client: &Client,
    election: &Election,
    clock: &SharedClock,
    seen: &mut Option<Seen>,
) -> Result<bool, Error> {
    let namespace = Some(election.namespace.as_str());
    let now = MicroTime(time::now(&**clock));
    let Some(mut lease) = client.get_opt::<Lease>(namespace, &election.name).await? else {
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(election.name.clone()),
                namespace: Some(election.namespace.clone()),
                ..ObjectMeta::default()
            },
            spec: Some(spec(election, now.clone(), now, 0)),
        };
        return match client.create(namespace, &lease).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_already_exists() => Ok(false),
            Err(error) => Err(error),
        };
    };
    let version = lease.metadata.resource_version.clone().unwrap_or_default();
    let at = match seen {
        Some(seen) if seen.resource_version == version => seen.at,
        _ => Instant::now(),
    };
    *seen = Some(Seen {
        resource_version: version,
        at,
    });
    let held = lease.spec.take().unwrap_or_default();
    let holder = held.holder_identity.as_deref().unwrap_or_default();
    let transitions = held.lease_transitions.unwrap_or_default();
    let lasts = Duration::from_secs(
        held.lease_duration_seconds
            .unwrap_or_default()
            .max(0)
            .unsigned_abs()
            .into(),
    );
    if holder == election.identity {
        let since = held.acquire_time.unwrap_or_else(|| now.clone());
        lease.spec = Some(spec(election, since, now, transitions));
    } else if holder.is_empty() || at.elapsed() >= lasts {
        lease.spec = Some(spec(election, now.clone(), now, transitions + 1));
    } else {
        return Ok(false);
    }
    match client.update(namespace, &lease).await {
        Ok(_) => Ok(true),
        Err(error) if error.is_conflict() || error.is_not_found() => Ok(false),
        Err(error) => Err(error),
    }
}

fn spec(election: &Election, since: MicroTime, now: MicroTime, transitions: i32) -> LeaseSpec {
    LeaseSpec {
        holder_identity: Some(election.identity.clone()),
        lease_duration_seconds: Some(election.duration.as_secs().max(1) as i32),
        acquire_time: Some(since),
        renew_time: Some(now),
        lease_transitions: Some(transitions),
        ..LeaseSpec::default()
    }
}

async fn give_back(client: &Client, election: &Election) -> Result<(), Error> {
    let namespace = Some(election.namespace.as_str());
    let mut lease = client.get::<Lease>(namespace, &election.name).await?;
    if let Some(spec) = &mut lease.spec
        && spec.holder_identity.as_deref() == Some(&election.identity)
    {
        spec.holder_identity = None;
        client.update(namespace, &lease).await?;
    }
    Ok(())
}
