//! Connections from the API server to nodes and pods. The API server assumes no route: whoever runs it knows how.

use std::io;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// Where to connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DialTarget {
    /// A node's kubelet.
    Node { name: String, address: String, port: u16 },
    Pod {
        namespace: String,
        name: String,
        address: String,
        port: u16,
    },
}

/// A byte stream in both directions.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// Opens connections into a cluster's network.
#[async_trait]
pub trait Dialer: Send + Sync + 'static {
    async fn dial(&self, cluster: &str, target: DialTarget) -> io::Result<Box<dyn Stream>>;
}

/// Connects to the address with this process's own sockets: for tests and for nodes on the same network.
#[derive(Clone, Copy, Debug, Default)]
pub struct TcpDialer;

#[async_trait]
impl Dialer for TcpDialer {
    async fn dial(&self, _cluster: &str, target: DialTarget) -> io::Result<Box<dyn Stream>> {
        let (DialTarget::Node { address, port, .. } | DialTarget::Pod { address, port, .. }) = target;
        let stream = TcpStream::connect((address.as_str(), port)).await?;
        stream.set_nodelay(true)?;
        Ok(Box::new(stream))
    }
}

/// Refuses every connection: for clusters without nodes.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoDialer;

#[async_trait]
impl Dialer for NoDialer {
    async fn dial(&self, cluster: &str, _target: DialTarget) -> io::Result<Box<dyn Stream>> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("cluster {cluster:?} has no way to its nodes"),
        ))
    }
}
