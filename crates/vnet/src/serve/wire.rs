//! The wire server: interface information of the machine that asks.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use vnet_model::interfaces::PATH_AND_QUERY;

use super::{SharedView, View};

/// A whole request must come within this time.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

pub async fn serve(listener: TcpListener, view: SharedView) {
    super::accept_each(listener, |stream, peer| {
        let view = view.clone();
        async move {
            let service = service_fn(move |request| {
                let response = answer(&view.read().clone(), peer, &request);
                async move { Ok::<_, Infallible>(response) }
            });
            let mut server = hyper::server::conn::http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(REQUEST_TIMEOUT);
            // A broken connection is its peer's affair.
            let _ = server.serve_connection(TokioIo::new(stream), service).await;
        }
    })
    .await;
}

fn answer(view: &View, peer: SocketAddr, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let asked = request.uri().path_and_query().map_or("", |p| p.as_str());
    if asked != PATH_AND_QUERY {
        return text(
            StatusCode::NOT_FOUND,
            "the wire server has only the interface information",
        );
    }
    if request.method() != Method::GET {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET");
    }
    let nic = match peer.ip() {
        IpAddr::V4(address) => view.vnet.nic_of(address),
        IpAddr::V6(_) => None,
    };
    match nic {
        Some(nic) => {
            let mut response = text(StatusCode::OK, view.vnet.interfaces_of(nic).to_xml());
            response
                .headers_mut()
                .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/xml"));
            response
        }
        None => text(
            StatusCode::FORBIDDEN,
            "the source address belongs to no NIC of this virtual network",
        ),
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
}
