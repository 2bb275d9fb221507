//! Container logs: files in the CRI's format, filtered and cut as the query asks, followed while the container runs.
//!
//! A line is `<RFC 3339 time> <stdout|stderr> <P|F> <text>`; `P` = the text goes on in the next line.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::stream;
use http::{Response, StatusCode, header};
use http_body::Frame;
use http_body_util::StreamBody;
use k8s_openapi::jiff::Timestamp;
use sandbox::ContainerState;
use tokio::{sync::mpsc, time::sleep};

use super::{Body, BoxError, Query, Refused, find};
use crate::{clock::after_s, kubelet::Core};

/// How often the end of a followed file is looked at.
const FOLLOW: Duration = Duration::from_millis(100);
/// Bytes per frame of the answer, and frames that may wait for the client.
const CHUNK: usize = 32 * 1024;
const CHUNKS: usize = 4;
/// A longer line is passed on in pieces.
const LINE_MAX: usize = 256 * 1024;

#[derive(Clone, Debug, Default)]
struct Options {
    follow: bool,
    timestamps: bool,
    tail: Option<u64>,
    limit: Option<u64>,
    since: Option<Timestamp>,
    /// Only this stream: `stdout` or `stderr`.
    stream: Option<&'static str>,
}

pub(crate) async fn serve(
    core: Arc<Core>,
    ns: &str,
    pod: &str,
    container: &str,
    query: &Query,
) -> Result<Response<Body>, Refused> {
    let shown = find(&core, ns, pod, None)?;
    let spec = shown.pod.spec.clone().unwrap_or_default();
    let mut names = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
        .map(|c| c.name.as_str());
    let known =
        names.any(|n| n == container) || spec.ephemeral_containers.iter().flatten().any(|c| c.name == container);
    if !known {
        return Err(Refused::bad(format!(
            "container {container} is not valid for pod {pod}"
        )));
    }
    let previous = query.flag("previous");
    let found = if previous {
        let latest = shown.runtime.latest(container).cloned();
        // A container that waits for its restart has its last run as the previous one only once the next has begun.
        shown
            .runtime
            .previous(container)
            .cloned()
            .or(latest.filter(|c| c.state == ContainerState::Exited && c.attempt > 0))
    } else {
        shown.runtime.latest(container).cloned()
    };
    let Some(status) = found else {
        return Err(Refused::bad(if previous {
            format!("previous terminated container \"{container}\" in pod \"{pod}\" not found")
        } else {
            let all = [&shown.status.container_statuses, &shown.status.init_container_statuses];
            let waiting = all.into_iter().flatten().flatten().find(|c| c.name == container);
            let reason = waiting.and_then(|c| c.state.as_ref()?.waiting.as_ref()?.reason.clone());
            let reason = reason.unwrap_or_else(|| "ContainerCreating".into());
            format!("container \"{container}\" in pod \"{pod}\" is waiting to start: {reason}")
        }));
    };
    let since = match (
        query.number("sinceSeconds")?,
        query.get("sinceTime").filter(|s| !s.is_empty()),
    ) {
        (Some(s), _) => Some(after_s(core.now(), -i64::try_from(s).unwrap_or(i64::MAX / 1000))),
        (None, Some(t)) => Some(
            t.parse()
                .map_err(|_| Refused::bad(format!("sinceTime: {t:?} is not an RFC 3339 time")))?,
        ),
        (None, None) => None,
    };
    let options = Options {
        follow: query.flag("follow") && !previous,
        timestamps: query.flag("timestamps"),
        tail: query.number("tailLines")?,
        limit: query.number("limitBytes")?,
        since,
        stream: None,
    };
    let options = match query.get("stream") {
        None | Some("" | "All") => options,
        Some("Stdout") => Options {
            stream: Some("stdout"),
            ..options
        },
        Some("Stderr") => Options {
            stream: Some("stderr"),
            ..options
        },
        Some(other) => {
            return Err(Refused::bad(format!(
                "stream: {other:?} is none of All, Stdout, Stderr"
            )));
        }
    };
    let meta = &shown.pod.metadata;
    let uid = meta.uid.clone().unwrap_or_default();
    let path = if status.log_path.is_absolute() {
        status.log_path.clone()
    } else {
        let dir = core.config.log_dir.join(format!("{ns}_{pod}_{uid}"));
        let relative = if status.log_path.as_os_str().is_empty() {
            PathBuf::from(container).join(format!("{}.log", status.attempt))
        } else {
            status.log_path.clone()
        };
        dir.join(relative)
    };
    let (tx, rx) = mpsc::channel::<Result<Frame<Bytes>, BoxError>>(CHUNKS);
    let id = status.id.clone();
    tokio::spawn(async move {
        let ended = || {
            let live = core.config.runtime.clone();
            let id = id.clone();
            async move {
                !live
                    .container_status(&id)
                    .await
                    .is_ok_and(|s| s.state == ContainerState::Running)
            }
        };
        if let Err(e) = copy(&path, &options, &tx, ended).await {
            tracing::debug!(path = %path.display(), error = %e, "log not served to its end");
            let _ = tx.send(Err(e.into())).await;
        }
    });
    let body = StreamBody::new(stream::unfold(rx, |mut rx| async { rx.recv().await.map(|f| (f, rx)) }));
    let mut response = Response::new(Body::new(body));
    *response.status_mut() = StatusCode::OK;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain"));
    Ok(response)
}

/// Sends what `options` select. Ends at the end of the file, or when following, once `ended` and nothing is left.
async fn copy<F: Future<Output = bool>>(
    path: &Path,
    options: &Options,
    tx: &mpsc::Sender<Result<Frame<Bytes>, BoxError>>,
    ended: impl Fn() -> F,
) -> io::Result<()> {
    let mut file = loop {
        match File::open(path) {
            Ok(file) => break file,
            // The file comes with the first byte; following waits for it.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if !options.follow || ended().await {
                    return Ok(());
                }
                sleep(FOLLOW).await;
            }
            Err(e) => return Err(e),
        }
    };
    let start = match options.tail {
        Some(n) => tail(&mut file, n)?,
        None => 0,
    };
    file.seek(SeekFrom::Start(start))?;
    let mut reader = BufReader::with_capacity(64 * 1024, file);
    let mut left = options.limit.unwrap_or(u64::MAX);
    let (mut line, mut out) = (Vec::new(), Vec::with_capacity(CHUNK));
    let mut continued = false;
    loop {
        // Asked before reading: what was written before the end is read after it was seen.
        let over = !options.follow || ended().await;
        loop {
            let n = reader.by_ref().take(LINE_MAX as u64).read_until(b'\n', &mut line)?;
            let whole = line.last() == Some(&b'\n');
            if n == 0 || (!whole && line.len() < LINE_MAX) {
                break;
            }
            let whole_before = !continued;
            continued = push(&line, options, whole_before, &mut out);
            line.clear();
            let full = out.len() as u64 >= left;
            if full {
                out.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            }
            if full || out.len() >= CHUNK {
                left -= out.len() as u64;
                if tx
                    .send(Ok(Frame::data(Bytes::from(std::mem::take(&mut out)))))
                    .await
                    .is_err()
                    || full
                {
                    return Ok(());
                }
            }
        }
        if !out.is_empty() {
            left -= out.len() as u64;
            if tx
                .send(Ok(Frame::data(Bytes::from(std::mem::take(&mut out)))))
                .await
                .is_err()
            {
                return Ok(());
            }
        }
        if over || left == 0 {
            return Ok(());
        }
        tokio::select! {
            // Both may be dropped: nothing is taken.
            () = sleep(FOLLOW) => {}
            () = tx.closed() => return Ok(()),
        }
    }
}

/// Appends one line as the client sees it; true if its text goes on in the next.
fn push(line: &[u8], options: &Options, begins: bool, out: &mut Vec<u8>) -> bool {
    let Some(Parts {
        time,
        stream,
        partial,
        text,
    }) = parse(line)
    else {
        out.extend_from_slice(line);
        return false;
    };
    if let Some(since) = options.since
        && std::str::from_utf8(time)
            .ok()
            .and_then(|t| t.parse::<Timestamp>().ok())
            .is_some_and(|t| t < since)
    {
        return partial;
    }
    if options.stream.is_some_and(|s| s.as_bytes() != stream) {
        return partial;
    }
    if options.timestamps && begins {
        out.extend_from_slice(time);
        out.push(b' ');
    }
    out.extend_from_slice(text);
    if !partial {
        out.push(b'\n');
    }
    partial
}

struct Parts<'a> {
    time: &'a [u8],
    stream: &'a [u8],
    partial: bool,
    /// Without the line's end.
    text: &'a [u8],
}

fn parse(line: &[u8]) -> Option<Parts<'_>> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut parts = line.splitn(4, |b| *b == b' ');
    let (time, stream, tag, text) = (
        parts.next()?,
        parts.next()?,
        parts.next()?,
        parts.next().unwrap_or_default(),
    );
    if !matches!(stream, b"stdout" | b"stderr") {
        return None;
    }
    Some(Parts {
        time,
        stream,
        partial: tag.first() == Some(&b'P'),
        text,
    })
}

/// Offset of the last `n` lines, read backwards in blocks.
fn tail(file: &mut File, n: u64) -> io::Result<u64> {
    const BLOCK: u64 = 16 * 1024;
    let size = file.seek(SeekFrom::End(0))?;
    if n == 0 {
        return Ok(size);
    }
    let (mut at, mut seen) = (size, 0);
    let mut block = vec![0; BLOCK as usize];
    while at > 0 {
        let begin = at.saturating_sub(BLOCK);
        let len = usize::try_from(at - begin).unwrap_or(0);
        file.seek(SeekFrom::Start(begin))?;
        file.read_exact(&mut block[..len])?;
        for i in (0..len).rev() {
            // The file's last newline ends the last line and begins none.
            if block[i] == b'\n' && begin + i as u64 + 1 != size {
                seen += 1;
                if seen == n {
                    return Ok(begin + i as u64 + 1);
                }
            }
        }
        at = begin;
    }
    Ok(0)
}

/// The last lines of a log, for a termination message; empty if there is none.
pub fn end_of(path: &Path, lines: usize, bytes_max: usize) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let start = tail(&mut file, lines as u64)?;
        file.seek(SeekFrom::Start(start))?;
        let mut raw = Vec::new();
        file.take(1024 * 1024).read_to_end(&mut raw)?;
        let mut out = Vec::new();
        let mut continued = false;
        for line in raw.split_inclusive(|b| *b == b'\n') {
            continued = push(line, &Options::default(), !continued, &mut out);
        }
        Ok(out)
    };
    let out = read().unwrap_or_default();
    String::from_utf8_lossy(&out[out.len().saturating_sub(bytes_max)..]).into_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const LOG: &str = "2026-11-21T02:00:00.000000001Z stdout F one\n\
                       2026-11-21T02:00:01.000000001Z stderr P tw\n\
                       2026-11-21T02:00:01.000000002Z stderr F o\n\
                       2026-11-21T02:00:02.000000001Z stdout F three\n";

    async fn read(options: Options) -> String {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(LOG.as_bytes()).unwrap();
        let (tx, mut rx) = mpsc::channel(64);
        copy(file.path(), &options, &tx, || async { true }).await.unwrap();
        drop(tx);
        let mut out = Vec::new();
        while let Some(f) = rx.recv().await {
            out.extend_from_slice(&f.unwrap().into_data().unwrap());
        }
        String::from_utf8(out).unwrap()
    }

    #[tokio::test]
    async fn options_select() {
        assert_eq!(read(Options::default()).await, "one\ntwo\nthree\n");
        assert_eq!(
            read(Options {
                tail: Some(1),
                ..Default::default()
            })
            .await,
            "three\n"
        );
        assert_eq!(
            read(Options {
                tail: Some(0),
                ..Default::default()
            })
            .await,
            ""
        );
        assert_eq!(
            read(Options {
                limit: Some(5),
                ..Default::default()
            })
            .await,
            "one\nt"
        );
        let since = Some("2026-11-21T02:00:02Z".parse().unwrap());
        assert_eq!(
            read(Options {
                since,
                ..Default::default()
            })
            .await,
            "three\n"
        );
        let stamped = read(Options {
            timestamps: true,
            tail: Some(3),
            ..Default::default()
        })
        .await;
        assert_eq!(
            stamped,
            "2026-11-21T02:00:01.000000001Z two\n2026-11-21T02:00:02.000000001Z three\n"
        );
    }

    #[tokio::test]
    async fn follows_to_the_end() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"2026-11-21T02:00:00Z stdout F one\n").unwrap();
        let (tx, mut rx) = mpsc::channel(64);
        let (stop_tx, stop) = tokio::sync::watch::channel(false);
        let path = file.path().to_owned();
        let task = tokio::spawn(async move {
            copy(
                &path,
                &Options {
                    follow: true,
                    ..Default::default()
                },
                &tx,
                || {
                    let over = *stop.borrow();
                    async move { over }
                },
            )
            .await
        });
        assert_eq!(rx.recv().await.unwrap().unwrap().into_data().unwrap(), "one\n");
        file.write_all(b"2026-11-21T02:00:00Z stdout F two\n").unwrap();
        assert_eq!(rx.recv().await.unwrap().unwrap().into_data().unwrap(), "two\n");
        file.write_all(b"2026-11-21T02:00:00Z stdout F last\n").unwrap();
        stop_tx.send_replace(true);
        assert_eq!(rx.recv().await.unwrap().unwrap().into_data().unwrap(), "last\n");
        assert!(rx.recv().await.is_none());
        task.await.unwrap().unwrap();
    }
}
