//! Calls of etcd's v3 API over one balanced gRPC channel.

use std::time::Duration;

use http::uri::PathAndQuery;
use tonic::client::Grpc;
use tonic::codec::Streaming;
use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use super::EtcdConfig;
use super::wire::{RangeRequest, RangeResponse, TxnRequest, TxnResponse, WatchRequest, WatchResponse};
use crate::Error;

/// How long one call may take; etcd itself gives a proposal about 7 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long reads are tried again while no endpoint answers.
const READ_PATIENCE: Duration = Duration::from_secs(8);
const RETRY_EVERY: Duration = Duration::from_millis(100);

#[derive(Clone)]
pub struct Client {
    channel: Channel,
}

impl Client {
    pub fn new(config: &EtcdConfig) -> Result<Self, Error> {
        let endpoints: Result<Vec<Endpoint>, Error> = config.endpoints.iter().map(|e| endpoint(e, config)).collect();
        let endpoints = endpoints?;
        let channel = match <[Endpoint; 1]>::try_from(endpoints) {
            Ok([one]) => one.connect_lazy(),
            Err(several) if several.is_empty() => {
                return Err(failed("configuring", "no endpoint is given".into()));
            }
            Err(several) => Channel::balance_list(several.into_iter()),
        };
        Ok(Self { channel })
    }

    fn grpc(&self) -> Grpc<Channel> {
        Grpc::new(self.channel.clone())
            .max_decoding_message_size(usize::MAX)
            .max_encoding_message_size(usize::MAX)
    }

    /// Reads, trying again while etcd cannot be reached.
    pub async fn range(&self, request: RangeRequest) -> Result<RangeResponse, Error> {
        let started = tokio::time::Instant::now();
        loop {
            match self.unary("/etcdserverpb.KV/Range", request.clone()).await {
                Ok(response) => return Ok(response),
                Err(status) if is_passing(status.code()) && started.elapsed() < READ_PATIENCE => {
                    tokio::time::sleep(RETRY_EVERY).await;
                }
                Err(status) => return Err(failed("reading", Box::new(status))),
            }
        }
    }

    /// Proposes a transaction once.
    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResponse, Status> {
        self.unary("/etcdserverpb.KV/Txn", request).await
    }

    /// Proposes a transaction that may be applied twice without harm, trying again while etcd cannot be reached.
    pub async fn idempotent_txn(&self, request: TxnRequest) -> Result<TxnResponse, Error> {
        let started = tokio::time::Instant::now();
        loop {
            match self.txn(request.clone()).await {
                Ok(response) => return Ok(response),
                Err(status) if is_passing(status.code()) && started.elapsed() < READ_PATIENCE => {
                    tokio::time::sleep(RETRY_EVERY).await;
                }
                Err(status) => return Err(failed("writing", Box::new(status))),
            }
        }
    }

    pub async fn watch(&self, request: WatchRequest) -> Result<Streaming<WatchResponse>, Status> {
        use futures::StreamExt;
        // The request stream stays open: its end would end the watch.
        let requests = futures::stream::iter([request]).chain(futures::stream::pending());
        let mut request = Request::new(requests);
        // A member that has lost its leader ends the stream, instead of keeping it silent.
        request
            .metadata_mut()
            .insert("hasleader", MetadataValue::from_static("true"));
        let mut grpc = self.grpc();
        ready(&mut grpc).await?;
        let path = PathAndQuery::from_static("/etcdserverpb.Watch/Watch");
        let codec = ProstCodec::default();
        let opening = grpc.streaming(request, path, codec);
        Ok(timed(opening).await?.into_inner())
    }

    async fn unary<Q, A>(&self, path: &'static str, message: Q) -> Result<A, Status>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let mut grpc = self.grpc();
        ready(&mut grpc).await?;
        let codec = ProstCodec::<Q, A>::default();
        let call = grpc.unary(Request::new(message), PathAndQuery::from_static(path), codec);
        Ok(timed(call).await?.into_inner())
    }
}

async fn ready(grpc: &mut Grpc<Channel>) -> Result<(), Status> {
    timed(async { grpc.ready().await.map_err(|e| Status::unavailable(e.to_string())) }).await
}

async fn timed<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    tokio::time::timeout(CALL_TIMEOUT, call)
        .await
        .unwrap_or_else(|_| Err(Status::deadline_exceeded("etcd did not answer in 10 s")))
}

fn endpoint(url: &str, config: &EtcdConfig) -> Result<Endpoint, Error> {
    let invalid = |e: tonic::transport::Error| failed("configuring an endpoint of", Box::new(e));
    let mut endpoint = Endpoint::from_shared(url.to_owned())
        .map_err(invalid)?
        .connect_timeout(Duration::from_secs(3))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true);
    if let Some(tls) = &config.tls {
        let mut client = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&tls.ca_pem));
        if let Some((certificate, key)) = &tls.identity_pem {
            client = client.identity(Identity::from_pem(certificate, key));
        }
        endpoint = endpoint.tls_config(client).map_err(invalid)?;
    } else if url.starts_with("https:") {
        return Err(failed(
            "configuring an endpoint of",
            format!("{url} needs the CA certificate of etcd").into(),
        ));
    }
    Ok(endpoint)
}

/// Whether the same read may succeed in a moment.
fn is_passing(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable | Code::DeadlineExceeded | Code::Unknown | Code::Cancelled
    )
}

pub fn failed(action: &'static str, source: Box<dyn std::error::Error + Send + Sync>) -> Error {
    Error::Io { action, source }
}
