//! One HTTP GET over a plain socket with deadlines; all the wire server needs, without a client library.
//!
//! Understands `Content-Length`, chunked bodies and bodies ended by closing. No redirects, no TLS, no name resolution
//! (the host must be an address, `localhost` excepted).

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use thiserror::Error;

/// Largest accepted answer, head included. 65,536 addresses at about 60 bytes are 4 MB; a NIC has at most 256.
const ANSWER_BYTES_MAX: usize = 1 << 20;

#[derive(Debug, Error)]
pub enum HttpError {
    #[error("URL {url:?} is not http://<address>[:port]/...")]
    Url { url: String },
    #[error("connecting to {address}")]
    Connect {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("talking to {address}")]
    Io {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("{address} did not answer completely within {ms} ms")]
    Timeout { address: SocketAddr, ms: u64 },
    #[error("the answer of {address} is larger than {ANSWER_BYTES_MAX} bytes")]
    TooLarge { address: SocketAddr },
    #[error("{address} answered something that is not HTTP: {reason}")]
    Nonsense { address: SocketAddr, reason: &'static str },
    #[error("{address} answered with status {status}")]
    Status { address: SocketAddr, status: u16 },
}

/// Fetches `url` and returns the body of a 200 answer. `timeout_ms` bounds the whole exchange.
pub fn get(url: &str, timeout_ms: u64) -> Result<Vec<u8>, HttpError> {
    let bad = || HttpError::Url { url: url.to_owned() };
    let rest = url.strip_prefix("http://").ok_or_else(bad)?;
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    if url.bytes().any(|b| b.is_ascii_whitespace() || b.is_ascii_control()) {
        return Err(bad());
    }
    let address = socket_address(authority).ok_or_else(bad)?;
    let deadline = Instant::now() + Duration::from_millis(timeout_ms);
    let left = || deadline.checked_duration_since(Instant::now()).filter(|d| !d.is_zero());
    let timeout = || HttpError::Timeout {
        address,
        ms: timeout_ms,
    };
    let classify = |source: io::Error| match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => timeout(),
        _ => HttpError::Io { address, source },
    };

    let mut stream = TcpStream::connect_timeout(&address, left().ok_or_else(timeout)?).map_err(|source| {
        if source.kind() == io::ErrorKind::TimedOut {
            timeout()
        } else {
            HttpError::Connect { address, source }
        }
    })?;
    stream.set_write_timeout(left()).map_err(classify)?;
    let request = format!("GET /{path} HTTP/1.1\r\nHost: {authority}\r\nAccept: */*\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(classify)?;

    let mut answer = Vec::new();
    let mut chunk = [0u8; 8192];
    loop {
        // A server that neither closes nor says a length too large for us would otherwise hold us to the deadline.
        if let Some(body) = complete(&answer, address)? {
            return Ok(body);
        }
        stream
            .set_read_timeout(Some(left().ok_or_else(timeout)?))
            .map_err(classify)?;
        match stream.read(&mut chunk).map_err(classify)? {
            0 => return at_end(&answer, address),
            n => answer.extend_from_slice(&chunk[..n]),
        }
        if answer.len() > ANSWER_BYTES_MAX {
            return Err(HttpError::TooLarge { address });
        }
    }
}

fn socket_address(authority: &str) -> Option<SocketAddr> {
    if let Ok(a) = authority.parse::<SocketAddr>() {
        return Some(a);
    }
    let (host, port) = match authority.rsplit_once(':') {
        Some((h, p)) => (h, p.parse().ok()?),
        None => (authority, 80),
    };
    let ip = if host == "localhost" {
        IpAddr::V4(Ipv4Addr::LOCALHOST)
    } else {
        host.parse().ok()?
    };
    Some(SocketAddr::new(ip, port))
}

struct Head<'a> {
    status: u16,
    length: Option<usize>,
    chunked: bool,
    body: &'a [u8],
}

fn head(answer: &[u8], address: SocketAddr) -> Result<Option<Head<'_>>, HttpError> {
    let nonsense = |reason| HttpError::Nonsense { address, reason };
    if !answer.is_empty() && !b"HTTP/1.".starts_with(&answer[..answer.len().min(7)]) {
        return Err(nonsense("no status line"));
    }
    let Some(end) = answer.windows(4).position(|w| w == b"\r\n\r\n") else {
        return Ok(None);
    };
    let text = std::str::from_utf8(&answer[..end]).map_err(|_| nonsense("the head is no text"))?;
    let mut lines = text.split("\r\n");
    let status = lines
        .next()
        .and_then(|l| l.split(' ').nth(1)?.parse().ok())
        .ok_or(nonsense("no status code"))?;
    let (mut length, mut chunked) = (None, false);
    for line in lines {
        let (name, value) = line.split_once(':').ok_or(nonsense("a header without a colon"))?;
        if name.eq_ignore_ascii_case("content-length") {
            length = Some(value.trim().parse().map_err(|_| nonsense("a bad Content-Length"))?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            chunked = value.trim().eq_ignore_ascii_case("chunked");
        }
    }
    Ok(Some(Head {
        status,
        length,
        chunked,
        body: &answer[end + 4..],
    }))
}

/// The body if the answer is complete by itself, before the peer closes.
fn complete(answer: &[u8], address: SocketAddr) -> Result<Option<Vec<u8>>, HttpError> {
    let Some(head) = head(answer, address)? else {
        return Ok(None);
    };
    if head.status != 200 {
        return Err(HttpError::Status {
            address,
            status: head.status,
        });
    }
    if head.chunked {
        return dechunk(head.body).map_err(|reason| HttpError::Nonsense { address, reason });
    }
    Ok(head.length.and_then(|n| head.body.get(..n)).map(<[u8]>::to_vec))
}

fn at_end(answer: &[u8], address: SocketAddr) -> Result<Vec<u8>, HttpError> {
    match head(answer, address)? {
        Some(Head {
            length: None,
            chunked: false,
            body,
            ..
        }) => Ok(body.to_vec()),
        _ => Err(HttpError::Nonsense {
            address,
            reason: "it ends too early",
        }),
    }
}

fn dechunk(mut rest: &[u8]) -> Result<Option<Vec<u8>>, &'static str> {
    let mut out = Vec::new();
    loop {
        let Some(end) = rest.windows(2).position(|w| w == b"\r\n") else {
            return Ok(None);
        };
        let size = std::str::from_utf8(&rest[..end]).map_err(|_| "a bad chunk size")?;
        let size = size.split(';').next().unwrap_or_default().trim();
        let size = usize::from_str_radix(size, 16).map_err(|_| "a bad chunk size")?;
        if size > ANSWER_BYTES_MAX {
            return Err("a chunk that is too large");
        }
        if size == 0 {
            return Ok(Some(out));
        }
        let data = &rest[end + 2..];
        if data.len() < size + 2 {
            return Ok(None);
        }
        out.extend_from_slice(&data[..size]);
        rest = &data[size + 2..];
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// Serves one connection with `answer`, then holds it open until the client goes away.
    fn serve(answer: &'static [u8]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/x", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let (mut s, _) = listener.accept().unwrap();
            let mut request = [0u8; 1024];
            let _ = s.read(&mut request);
            let _ = s.write_all(answer);
            if answer.ends_with(b"<close>") {
                return;
            }
            let _ = s.read(&mut request);
        });
        url
    }

    #[test]
    fn reads_each_kind_of_body() {
        let url = serve(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc");
        assert_eq!(get(&url, 2000).unwrap(), b"abc");
        let url = serve(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\n\r\n");
        assert_eq!(get(&url, 2000).unwrap(), b"abc");
        let url = serve(b"HTTP/1.0 200 OK\r\n\r\nabc<close>");
        assert_eq!(get(&url, 2000).unwrap(), b"abc<close>");
    }

    #[test]
    fn nonsense_silence_and_errors_are_told_apart() {
        assert!(matches!(
            get(&serve(b"SSH-2.0-x\r\n"), 2000),
            Err(HttpError::Nonsense { .. })
        ));
        assert!(matches!(
            get(&serve(b"HTTP/1.1 503 No\r\n\r\n"), 2000),
            Err(HttpError::Status { status: 503, .. })
        ));
        assert!(matches!(
            get(&serve(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"), 50),
            Err(HttpError::Timeout { .. })
        ));
        assert!(matches!(
            get(&serve(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n<close>"), 2000),
            Err(HttpError::Nonsense { .. })
        ));
        assert!(matches!(get(&serve(b""), 50), Err(HttpError::Timeout { .. })));
        assert!(matches!(
            get("http://127.0.0.1:1/", 2000),
            Err(HttpError::Connect { .. })
        ));
        assert!(matches!(get("http://example.invalid/", 50), Err(HttpError::Url { .. })));
        assert!(matches!(get("http://127.0.0.1/a b", 50), Err(HttpError::Url { .. })));
        let big: &'static [u8] = Vec::leak([b"HTTP/1.1 200 OK\r\n\r\n".as_slice(), &vec![b'x'; 2 << 20]].concat());
        assert!(matches!(get(&serve(big), 5000), Err(HttpError::TooLarge { .. })));
    }
}
