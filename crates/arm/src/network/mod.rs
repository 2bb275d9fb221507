//! The network's controller: gives interfaces and public addresses their addresses and every network object its state.
//!
//! One task decides for the whole platform, from a fresh read of every object, so no address is given twice: reads, plans
//! ([`plan::plan`]), writes statuses, and waits for the next change. Bursts of changes are one pass.

mod balancer;
pub mod plan;
mod private_dns;
mod public;

use std::{sync::Arc, time::Duration};

use ipnet::IpNet;
use reconcile::{Error, Informers};
use resources::{
    ApplicationSecurityGroup, LoadBalancer, Machine, NatGateway, NetworkInterface, NetworkSecurityGroup,
    PrivateDnsZone, PublicIPAddress, PublicIPPrefix, ResourceGroup, RouteTable, VirtualNetwork,
};
use stdx::{BackoffPolicy, Rng, Shutdown};
use tokio::sync::Notify;

use crate::home::Home;

/// A pass without a change, in case an event was missed.
const RESYNC: Duration = Duration::from_secs(60);
const RETRY: BackoffPolicy = BackoffPolicy::doubling(Duration::from_millis(5), Duration::from_secs(5));

/// Runs until `shutdown`.
pub async fn run(home: Home, informers: Informers, pool: Option<IpNet>, shutdown: Shutdown) {
    let changed = Arc::new(Notify::new());
    let wake = || {
        let changed = changed.clone();
        move |_: &reconcile::Change| changed.notify_one()
    };
    informers.get::<ResourceGroup>().on_change(wake());
    informers.get::<VirtualNetwork>().on_change(wake());
    informers.get::<NetworkInterface>().on_change(wake());
    informers.get::<PublicIPAddress>().on_change(wake());
    informers.get::<LoadBalancer>().on_change(wake());
    informers.get::<NetworkSecurityGroup>().on_change(wake());
    informers.get::<RouteTable>().on_change(wake());
    informers.get::<NatGateway>().on_change(wake());
    informers.get::<PublicIPPrefix>().on_change(wake());
    informers.get::<ApplicationSecurityGroup>().on_change(wake());
    informers.get::<PrivateDnsZone>().on_change(wake());
    informers.get::<Machine>().on_change(wake());
    let mut failures = 0u32;
    let mut rng = Rng::from_entropy();
    loop {
        let wait = match pass(&home, pool).await {
            Ok(()) => {
                failures = 0;
                RESYNC
            }
            Err(e) => {
                let lost_race = e.is_conflict() || e.is_not_found();
                if !lost_race {
                    tracing::warn!(controller = "arm-network", error = %stdx::chain(&e), "pass failed");
                }
                failures += 1;
                RETRY.delay(failures, &mut rng)
            }
        };
        // Cancel safe: a notification that is not awaited stays for the next turn.
        tokio::select! {
            () = shutdown.wait() => return,
            () = changed.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// One pass: everything that can be written is; the first error that is not a lost race comes back.
async fn pass(home: &Home, pool: Option<IpNet>) -> Result<(), Error> {
    let inputs = plan::Inputs {
        groups: home.list("resourcegroups").await?,
        vnets: home.list("virtualnetworks").await?,
        nics: home.list("networkinterfaces").await?,
        public_ips: home.list("publicipaddresses").await?,
        load_balancers: home.list("loadbalancers").await?,
        security_groups: home.list("networksecuritygroups").await?,
        route_tables: home.list("routetables").await?,
        nat_gateways: home.list("natgateways").await?,
        public_ip_prefixes: home.list("publicipprefixes").await?,
        application_groups: home.list("applicationsecuritygroups").await?,
        private_zones: home.list("privatednszones").await?,
        machines: home.list("machines").await?,
        pool,
    };
    let mut result = Ok(());
    for w in plan::plan(&inputs) {
        if let Err(e) = home.update_status(w.plural, w.object.name(), &w.object).await {
            tracing::debug!(controller = "arm-network", name = w.object.name(), error = %stdx::chain(&e), "status not written");
            result = Err(e);
        }
    }
    result
}
