//! Serves one cluster and writes its admin kubeconfig: `cargo run -p apiserver --example serve -- --dir X --port N`.

use std::path::PathBuf;
use std::sync::Arc;

use apiserver::{ApiServer, ApiServerConfig, ClusterConfig, TcpDialer};
use store::LocalEngine;

type AnyError = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), AnyError> {
    let mut args = std::env::args().skip(1);
    let (mut dir, mut port, mut name) = (PathBuf::from("cluster-data"), 6443_u16, "demo".to_owned());
    while let Some(flag) = args.next() {
        let value = args.next().ok_or_else(|| format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--dir" => dir = value.into(),
            "--port" => port = value.parse()?,
            "--name" => name = value,
            other => return Err(format!("unknown flag {other}; use --dir DIR --port N --name CLUSTER").into()),
        }
    }
    std::fs::create_dir_all(&dir)?;
    let started = std::time::Instant::now();
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
    let url = format!("https://{}", listener.local_addr()?);
    let engine = LocalEngine::open(&dir.join("store"))?;
    let api = ApiServer::new(ApiServerConfig {
        engine,
        dialer: Arc::new(TcpDialer),
        data_dir: dir.join("clusters"),
        clock: stdx::RealClock::shared(),
    });
    let cluster = api.create_cluster(ClusterConfig::new(&name, &url)).await?;
    let kubeconfig = dir.join("kubeconfig");
    std::fs::write(&kubeconfig, cluster.kubeconfig(&name, "admin", &["system:masters"])?)?;
    let serving = cluster.serve(listener);
    println!("{name} answers at {url} after {:?}", started.elapsed());
    println!("export KUBECONFIG={}", kubeconfig.canonicalize()?.display());
    tokio::select! {
        done = serving => done?,
        _ = tokio::signal::ctrl_c() => cluster.stop(),
    }
    Ok(())
}
