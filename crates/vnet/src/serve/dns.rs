//! VNet DNS: private zones that are linked to the network, names of its NICs and the records of its spec; everything else
//! goes to the host's resolvers, if there are any, and is refused at once otherwise. Names cross from one virtual network
//! to another only in a zone that both are linked to.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, PTR};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use vnet_model::fabric::VnetSpec;

use super::zones::{Found, Zones};
use super::{CONCURRENT_MAX, SharedView, View};

/// NICs come and go within seconds.
const TTL_S: u32 = 5;
/// How long one resolver may take.
const RESOLVER_TIMEOUT: Duration = Duration::from_secs(2);
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// How many aliases are followed for one question.
const ALIASES_MAX: usize = 8;
/// Without EDNS.
const DATAGRAM_BYTES: usize = 512;

/// Names and addresses of one virtual network; names in lower case without the last dot.
#[derive(Default)]
pub struct Names {
    addresses: BTreeMap<String, Vec<Ipv4Addr>>,
    /// Address to the names that it has, the network's own first.
    hosts: BTreeMap<Ipv4Addr, Vec<String>>,
    suffix: String,
    zones: Zones,
}

impl Names {
    pub fn of(vnet: &VnetSpec) -> Self {
        let fold = |name: &str| name.trim_end_matches('.').to_ascii_lowercase();
        let suffix = fold(&vnet.dns.suffix);
        let mut out = Self {
            suffix: suffix.clone(),
            zones: Zones::of(&vnet.private_zones),
            ..Self::default()
        };
        for nic in &vnet.nics {
            let (Some(host), Some(primary)) = (&nic.host_name, nic.primary()) else {
                continue;
            };
            let host = fold(host);
            let whole = if suffix.is_empty() {
                host.clone()
            } else {
                format!("{host}.{suffix}")
            };
            out.addresses.entry(host).or_default().push(primary);
            if !suffix.is_empty() {
                out.addresses.entry(whole.clone()).or_default().push(primary);
            }
            let own_zones = vnet.private_zones.iter().filter(|z| z.registration);
            let registered =
                own_zones.map(|z| format!("{}.{}", fold(nic.host_name.as_deref().unwrap_or_default()), z.name));
            out.hosts
                .insert(primary, std::iter::once(whole).chain(registered).collect());
        }
        for record in &vnet.dns.records {
            out.addresses
                .entry(fold(&record.name))
                .or_default()
                .extend(&record.addresses);
        }
        out
    }
}

/// What becomes of a question.
enum Verdict {
    Reply(Message),
    /// Not ours: for the resolvers.
    Forward,
    /// An alias whose target is not ours: the answer so far, and the question that the resolvers are asked.
    Follow(Message, Message),
}

/// The answer to a question that needs the resolvers; `None` if there is none to give.
async fn ask_outside(
    view: &View,
    query: &Message,
    question: &[u8],
    verdict: Verdict,
    by_stream: bool,
) -> Option<Vec<u8>> {
    match verdict {
        Verdict::Reply(reply) => reply.to_vec().ok(),
        Verdict::Forward => match ask_resolvers(&view.resolvers, question, by_stream).await {
            Some(answer) => Some(answer),
            None => refusal(query, ResponseCode::ServFail).to_vec().ok(),
        },
        Verdict::Follow(mut reply, further) => {
            let answer = ask_resolvers(&view.resolvers, &further.to_vec().ok()?, by_stream).await;
            match answer.and_then(|a| Message::from_vec(&a).ok()) {
                Some(answer) => {
                    reply.metadata.response_code = answer.metadata.response_code;
                    reply.add_answers(answer.answers);
                }
                None => reply.metadata.response_code = ResponseCode::ServFail,
            }
            reply.to_vec().ok()
        }
    }
}

pub async fn serve_udp(socket: UdpSocket, view: SharedView) {
    let socket = Arc::new(socket);
    let slots = Arc::new(Semaphore::new(CONCURRENT_MAX));
    let mut buffer = vec![0; 4096];
    loop {
        let Ok((length, peer)) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        let question = &buffer[..length];
        let Ok(query) = Message::from_vec(question) else {
            continue;
        };
        let now = view.read().clone();
        match judge(&now, &query) {
            Verdict::Reply(reply) => send(&socket, &query, reply, peer).await,
            // Full: the client asks again.
            outside => {
                let Ok(slot) = slots.clone().try_acquire_owned() else {
                    continue;
                };
                let (socket, question) = (socket.clone(), question.to_vec());
                tokio::spawn(async move {
                    if let Some(answer) = ask_outside(&now, &query, &question, outside, false).await {
                        // A client that went away needs no answer.
                        let _ = socket.send_to(&answer, peer).await;
                    }
                    drop(slot);
                });
            }
        }
    }
}

async fn send(socket: &UdpSocket, query: &Message, reply: Message, peer: SocketAddr) {
    let limit = query
        .edns
        .as_ref()
        .map_or(DATAGRAM_BYTES, |_| usize::from(query.max_payload()).max(DATAGRAM_BYTES));
    let encoded = match reply.to_vec() {
        Ok(bytes) if bytes.len() > limit => reply.truncate().to_vec(),
        other => other,
    };
    if let Ok(bytes) = encoded {
        // A client that went away needs no answer.
        let _ = socket.send_to(&bytes, peer).await;
    }
}

pub async fn serve_tcp(listener: TcpListener, view: SharedView) {
    super::accept_each(listener, |stream, _| {
        let view = view.clone();
        async move {
            // A broken connection is its peer's affair.
            let _ = converse(stream, view).await;
        }
    })
    .await;
}

async fn converse(mut stream: TcpStream, view: SharedView) -> std::io::Result<()> {
    loop {
        let length = timeout(IDLE_TIMEOUT, stream.read_u16()).await??;
        let mut question = vec![0; usize::from(length)];
        timeout(IDLE_TIMEOUT, stream.read_exact(&mut question)).await??;
        let Ok(query) = Message::from_vec(&question) else {
            return Ok(());
        };
        let now = view.read().clone();
        let verdict = judge(&now, &query);
        let answer = ask_outside(&now, &query, &question, verdict, true).await;
        let Some(answer) = answer else { return Ok(()) };
        let Ok(length) = u16::try_from(answer.len()) else {
            return Ok(());
        };
        let mut framed = length.to_be_bytes().to_vec();
        framed.extend(answer);
        stream.write_all(&framed).await?;
    }
}

fn judge(view: &View, query: &Message) -> Verdict {
    let [question] = &query.queries[..] else {
        return Verdict::Reply(refusal(query, ResponseCode::FormErr));
    };
    if query.metadata.message_type != MessageType::Query || query.metadata.op_code != OpCode::Query {
        return Verdict::Reply(refusal(query, ResponseCode::NotImp));
    }
    let name = question.name().to_ascii();
    let folded = name.trim_end_matches('.').to_ascii_lowercase();
    let names = &view.names;
    let mut reply = refusal(query, ResponseCode::NoError);
    if let Some(verdict) = from_zones(view, query, &mut reply, &folded) {
        return verdict;
    }
    if let Some(addresses) = names.addresses.get(&folded) {
        if matches!(question.query_type(), RecordType::A | RecordType::ANY) {
            let record = |a: &Ipv4Addr| Record::from_rdata(question.name().clone(), TTL_S, RData::A(A(*a)));
            reply.add_answers(addresses.iter().map(record));
        }
        return Verdict::Reply(reply);
    }
    if let Some(hosts) = reverse(&folded).and_then(|a| names.hosts.get(&a)) {
        if question.query_type() == RecordType::PTR {
            let targets = hosts.iter().filter_map(|h| Name::from_ascii(format!("{h}.")).ok());
            let record = |t| Record::from_rdata(question.name().clone(), TTL_S, RData::PTR(PTR(t)));
            reply.add_answers(targets.map(record));
        }
        return Verdict::Reply(reply);
    }
    let ours = !names.suffix.is_empty() && folded.ends_with(&format!(".{}", names.suffix));
    if ours || view.resolvers.is_empty() {
        return Verdict::Reply(refusal(query, ResponseCode::NXDomain));
    }
    Verdict::Forward
}

/// What the private zones say of the question, aliases followed; `None` if the name is in none of them.
fn from_zones(view: &View, query: &Message, reply: &mut Message, name: &str) -> Option<Verdict> {
    let question = query.queries.first()?;
    let kind = question.query_type();
    let (mut name, mut owner) = (name.to_owned(), question.name().clone());
    for followed in 0..=ALIASES_MAX {
        match view.names.zones.find(&name, &owner, kind) {
            Found::Records(records) => {
                reply.add_answers(records);
                break;
            }
            Found::Alias(record, target) => {
                reply.add_answer(record);
                owner = Name::from_ascii(format!("{target}.")).ok()?;
                name = target;
            }
            Found::NoData(soa) => {
                reply.add_authority(soa);
                break;
            }
            Found::NoName(soa, fallback) => {
                if fallback && !view.resolvers.is_empty() {
                    return Some(outside(reply, &owner, kind, followed));
                }
                reply.add_authority(soa);
                reply.metadata.response_code = ResponseCode::NXDomain;
                break;
            }
            Found::NotOurs if followed == 0 => return None,
            Found::NotOurs => {
                if let Some(addresses) = view.names.addresses.get(&name) {
                    let fits = matches!(kind, RecordType::A | RecordType::ANY);
                    let record = |a: &Ipv4Addr| Record::from_rdata(owner.clone(), TTL_S, RData::A(A(*a)));
                    reply.add_answers(addresses.iter().filter(|_| fits).map(record));
                } else if !view.resolvers.is_empty() {
                    return Some(outside(reply, &owner, kind, followed));
                } else {
                    reply.metadata.response_code = ResponseCode::NXDomain;
                }
                break;
            }
        }
    }
    Some(Verdict::Reply(std::mem::replace(reply, Message::query())))
}

/// The name at the end of `followed` aliases is asked for outside.
fn outside(reply: &mut Message, name: &Name, kind: RecordType, followed: usize) -> Verdict {
    if followed == 0 {
        return Verdict::Forward;
    }
    let mut further = Message::query();
    further.metadata.id = reply.metadata.id;
    further.metadata.recursion_desired = true;
    further.add_query(hickory_proto::op::Query::query(name.clone(), kind));
    Verdict::Follow(std::mem::replace(reply, Message::query()), further)
}

/// The address that a name below `in-addr.arpa` stands for.
fn reverse(name: &str) -> Option<Ipv4Addr> {
    let octets: Vec<u8> = name
        .strip_suffix(".in-addr.arpa")?
        .split('.')
        .map(|p| p.parse().ok())
        .collect::<Option<_>>()?;
    let [d, c, b, a] = octets[..] else { return None };
    Some(Ipv4Addr::new(a, b, c, d))
}

/// A reply without records.
fn refusal(query: &Message, code: ResponseCode) -> Message {
    let mut reply = Message::response(query.metadata.id, query.metadata.op_code);
    reply.metadata.response_code = code;
    reply.metadata.recursion_desired = query.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    reply.metadata.authoritative = code != ResponseCode::ServFail;
    reply.add_queries(query.queries.iter().cloned());
    reply
}

/// The first answer of the resolvers, asked one after the other from the host's namespace.
async fn ask_resolvers(resolvers: &[IpAddr], question: &[u8], by_stream: bool) -> Option<Vec<u8>> {
    for resolver in resolvers {
        let at = SocketAddr::from((*resolver, 53));
        let asked = async {
            if by_stream {
                ask_stream(at, question).await
            } else {
                ask_datagram(at, question).await
            }
        };
        if let Ok(Ok(answer)) = timeout(RESOLVER_TIMEOUT, asked).await {
            return Some(answer);
        }
    }
    None
}

async fn ask_datagram(at: SocketAddr, question: &[u8]) -> std::io::Result<Vec<u8>> {
    let any: IpAddr = if at.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(at).await?;
    socket.send(question).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // The same question's number, or it is not the answer.
        if length >= 12 && question.len() >= 2 && buffer[..2] == question[..2] {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn ask_stream(at: SocketAddr, question: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(at).await?;
    let length = u16::try_from(question.len()).map_err(std::io::Error::other)?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend(question);
    stream.write_all(&framed).await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}
