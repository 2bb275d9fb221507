//! The API server's way to nodes and pods, set once the home cluster it depends on is open.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::OnceLock,
};

use apiserver::{DialTarget, Dialer, Stream};
use async_trait::async_trait;
use machines::dial::InwardDialer;

#[derive(Default)]
pub struct PlatformDialer {
    inward: OnceLock<InwardDialer>,
}

impl PlatformDialer {
    /// Later calls change nothing: there is one platform per process.
    pub fn set(&self, inward: InwardDialer) {
        let _ = self.inward.set(inward);
    }
}

#[async_trait]
impl Dialer for PlatformDialer {
    async fn dial(&self, cluster: &str, target: DialTarget) -> io::Result<Box<dyn Stream>> {
        let Some(inward) = self.inward.get() else {
            return Err(io::Error::new(
                io::ErrorKind::NotConnected,
                "the platform is still starting",
            ));
        };
        let (node, address, port) = match &target {
            DialTarget::Node { name, address, port } => (name.as_str(), address, *port),
            DialTarget::Pod { address, port, .. } => ("", address, *port),
        };
        let ip: IpAddr = address
            .parse()
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("{address:?} is no IP address")))?;
        Ok(Box::new(inward.dial(cluster, node, SocketAddr::new(ip, port)).await?))
    }
}
