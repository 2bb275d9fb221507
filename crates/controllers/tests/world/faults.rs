//! A bad day between a client and its API: calls that never arrive, answers that are lost after the deed, servers that
//! are busy, and watches cut at any frame. The seed decides each call's fate in the order of calls.

use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use reconcile::{Body, BoxError, LocalService, full_body};
use stdx::Rng;
use tower::Service;

enum Fate {
    Fine,
    /// The call never arrives.
    Lost,
    /// The call is done, its answer never arrives.
    Unanswered,
    /// The server is busy.
    Busy,
    /// The stream breaks after this many frames.
    Cut(u64),
}

/// Puts the faults of `seed` before `service`: about one call in five fails, one watch in two is cut early.
pub fn inject(service: LocalService, seed: u64) -> LocalService {
    let rng = Arc::new(Mutex::new(Rng::seeded(seed)));
    LocalService::new(tower::service_fn(move |request: Request<Body>| {
        let is_watch = request.uri().query().is_some_and(|q| q.contains("watch=1"));
        let fate = {
            let mut rng = rng.lock();
            match (is_watch, rng.below(100)) {
                (true, 0..50) => Fate::Cut(rng.below(30)),
                (_, 50..57) => Fate::Lost,
                (false, 57..64) => Fate::Unanswered,
                (_, 64..70) => Fate::Busy,
                _ => Fate::Fine,
            }
        };
        answer(service.clone(), request, fate)
    }))
}

/// By hand, because `oneshot` defeats the compiler's `Send` proof for this service type.
async fn call(mut service: LocalService, request: Request<Body>) -> Result<Response<Body>, BoxError> {
    std::future::poll_fn(|cx| service.poll_ready(cx)).await?;
    service.call(request).await
}

async fn answer(service: LocalService, request: Request<Body>, fate: Fate) -> Result<Response<Body>, BoxError> {
    match fate {
        Fate::Fine => call(service, request).await,
        Fate::Lost => Err("connection refused".into()),
        Fate::Unanswered => {
            call(service, request).await?.into_body().collect().await?;
            Err("connection reset".into())
        }
        Fate::Busy => {
            let status = r#"{"kind":"Status","reason":"ServiceUnavailable","message":"busy","code":503}"#;
            Ok(Response::builder().status(503).body(full_body(status))?)
        }
        Fate::Cut(frames) => {
            let (parts, mut body) = call(service, request).await?.into_parts();
            let (mut sender, cut) = http_body_util::channel::Channel::<Bytes, BoxError>::new(1);
            tokio::spawn(async move {
                for _ in 0..frames {
                    let Some(Ok(frame)) = body.frame().await else { return };
                    let Ok(data) = frame.into_data() else { continue };
                    if sender.send_data(data).await.is_err() {
                        return;
                    }
                }
                sender.abort("connection reset".into());
            });
            Ok(Response::from_parts(parts, Body::new(cut)))
        }
    }
}
