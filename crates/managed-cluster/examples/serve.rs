//! The management plane by itself, for trying the unmodified az: home and hosted clusters are in memory and machines are
//! pretended (a node is Ready a second after it was asked for). Prints what to type.
//!
//!     cargo run -p managed-cluster --example serve -- 8443 /tmp/oaks-az
//!
//! No real cluster runs behind it: use `oaks up` for that.

#[path = "../tests/support/mod.rs"]
mod support;

use std::{net::Ipv4Addr, path::PathBuf, time::Duration};

use support::{CLIENT, Platform, SECRET, TENANT};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .init();
    let mut args = std::env::args().skip(1);
    let port: u16 = args.next().map_or(Ok(0), |p| p.parse())?;
    let dir = PathBuf::from(args.next().unwrap_or_else(|| "/tmp/oaks-az".into()));
    let platform = Platform::start((Ipv4Addr::LOCALHOST, port).into(), Duration::from_millis(1000)).await;
    let recipe = arm::az::AzRecipe {
        base_url: platform.base_url.clone(),
        tenant: TENANT.into(),
        client_id: CLIENT.into(),
        client_secret: SECRET.into(),
    };
    std::fs::create_dir_all(&dir)?;
    let (cloud, bundle) = (dir.join("cloud.json"), dir.join("ca-bundle.pem"));
    std::fs::write(&cloud, recipe.cloud_file())?;
    std::fs::write(&bundle, arm::az::ca_bundle("", &platform.ca_pem))?;
    println!("# serving {}", platform.base_url);
    print!("{}", recipe.exports(&dir.join("config"), &bundle));
    for command in recipe.commands(&cloud) {
        println!("az {}", command.join(" "));
    }
    tokio::signal::ctrl_c().await?;
    let machines = platform
        .home
        .list::<resources::Machine>(None, &Default::default())
        .await?
        .items
        .len();
    println!(
        "# ends with {machines} machines in {} hosted clusters",
        platform.control_planes.count()
    );
    platform.stop().await;
    Ok(())
}
