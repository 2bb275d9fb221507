//! Image pulls asked for by machines: the store of the host is read-only inside them, so the host does the pulling.
//!
//! One request and one reply per connection, each one JSON line, on a unix socket that is bound into every machine.

use std::{io, path::Path, sync::Arc};

use anyhow::{Context as _, Result};
use async_trait::async_trait;
use sandbox::{Error, ImageStatus, Images, RegistryAuth};
use serde::{Deserialize, Serialize};
use stdx::Shutdown;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
};

/// Longest request line: a reference and a registry password.
const REQUEST_BYTES_MAX: u64 = 64 * 1024;
/// Pulls at one time for all machines; further ones wait.
const PULLS_MAX: usize = 8;

#[derive(Deserialize, Serialize)]
struct Request {
    reference: String,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
}

#[derive(Deserialize, Serialize)]
enum Reply {
    Pulled(ImageStatus),
    NotPresent(String),
    Failed(String),
}

/// Serves pulls from `images` until `shutdown`.
pub async fn serve(socket: &Path, images: Arc<dyn Images>, shutdown: Shutdown) -> Result<()> {
    match std::fs::remove_file(socket) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("removing {}", socket.display()));
        }
        _ => {}
    }
    let listener = UnixListener::bind(socket).with_context(|| format!("listening at {}", socket.display()))?;
    let permits = Arc::new(Semaphore::new(PULLS_MAX));
    tokio::spawn(async move {
        loop {
            // accept() is cancel safe: a connection not yet returned stays in the backlog.
            let accepted = tokio::select! {
                a = listener.accept() => a,
                () = shutdown.wait() => return,
            };
            match accepted {
                Ok((stream, _)) => {
                    let (images, permits) = (images.clone(), permits.clone());
                    tokio::spawn(async move {
                        let _permit = permits.acquire().await;
                        if let Err(e) = answer(stream, images).await {
                            tracing::warn!(reason = %e, "image pull request dropped");
                        }
                    });
                }
                Err(e) => {
                    tracing::warn!(reason = %e, "accepting an image pull request failed");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(())
}

async fn answer(stream: UnixStream, images: Arc<dyn Images>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    BufReader::new(read.take(REQUEST_BYTES_MAX))
        .read_line(&mut line)
        .await?;
    let reply = match serde_json::from_str::<Request>(&line) {
        Err(e) => Reply::Failed(format!("the request is malformed: {e}")),
        Ok(request) => {
            let auth = request
                .username
                .zip(request.password)
                .map(|(username, password)| RegistryAuth { username, password });
            match images.pull_image(&request.reference, auth).await {
                Ok(image) => Reply::Pulled(image),
                Err(Error::ImageNotPresent { reason, .. }) => Reply::NotPresent(reason),
                Err(Error::ImagePull { reason, .. }) => Reply::Failed(reason),
                Err(e) => Reply::Failed(stdx::chain(&e).to_string()),
            }
        }
    };
    let mut text = serde_json::to_vec(&reply)?;
    text.push(b'\n');
    write.write_all(&text).await
}

/// The machine's side: answers from the read-only store, pulls through the host.
pub struct HostImages {
    pub local: Arc<dyn Images>,
    pub socket: std::path::PathBuf,
}

#[async_trait]
impl Images for HostImages {
    async fn image_status(&self, reference: &str) -> Result<Option<ImageStatus>, Error> {
        self.local.image_status(reference).await
    }

    async fn pull_image(&self, reference: &str, auth: Option<RegistryAuth>) -> Result<ImageStatus, Error> {
        if let Some(found) = self.local.image_status(reference).await? {
            return Ok(found);
        }
        let failed = |reason: String| Error::ImagePull {
            image: reference.to_owned(),
            reason,
        };
        let ask = async {
            let mut stream = UnixStream::connect(&self.socket).await?;
            let (username, password) = auth.map_or((None, None), |a| (Some(a.username), Some(a.password)));
            let mut text = serde_json::to_vec(&Request {
                reference: reference.to_owned(),
                username,
                password,
            })?;
            text.push(b'\n');
            stream.write_all(&text).await?;
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line).await?;
            Ok::<Reply, io::Error>(serde_json::from_str(&line)?)
        };
        match ask.await {
            Ok(Reply::Pulled(image)) => Ok(image),
            Ok(Reply::NotPresent(reason)) => Err(Error::ImageNotPresent {
                image: reference.to_owned(),
                reason,
            }),
            Ok(Reply::Failed(reason)) => Err(failed(reason)),
            Err(e) => Err(failed(format!("the host agent does not answer: {e}"))),
        }
    }

    async fn list_images(&self) -> Result<Vec<ImageStatus>, Error> {
        self.local.list_images().await
    }

    /// Images belong to the host: a machine cannot remove them.
    async fn remove_image(&self, _reference: &str) -> Result<(), Error> {
        Err(Error::Unsupported {
            feature: "removing an image from inside a machine (the host's store is shared)".to_owned(),
        })
    }
}
