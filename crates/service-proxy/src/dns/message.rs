//! Queries in, answers out, as bytes. No IO.

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record as WireRecord, RecordType,
        rdata::{A, AAAA, CNAME, PTR, SOA, SRV, TXT},
    },
};

use super::zone::{Data, Kind, Lookup, Record, Zone};

/// Seconds that resolvers may keep an answer of ours, or the absence of one: endpoints change quickly.
const TTL_S: u32 = 5;

/// Answers over UDP stay below the size that fits every path unfragmented, whatever the client offers.
pub const UDP_BYTES_MAX: u16 = 1232;
const UDP_BYTES_PLAIN: u16 = 512;

/// What to do with a query.
#[derive(Debug)]
pub enum Action {
    /// Not a query at all: say nothing.
    Ignore,
    /// Send this.
    Reply(Vec<u8>),
    /// Ask the upstream the same; `fallback` is sent if it does not answer.
    Forward { fallback: Vec<u8> },
    /// Ours is an alias to a foreign name: ask the upstream for `target` and append what it says.
    Chase {
        partial: Box<Message>,
        target: String,
        kind: RecordType,
    },
}

/// Decides about one datagram or frame. `udp` bounds the answer's size; `turn` rotates equal answers.
pub fn handle(zone: &Zone, raw: &[u8], udp: bool, turn: usize) -> Action {
    let Ok(query) = Message::from_vec(raw) else {
        return match raw {
            // Enough to answer to: an id, and not an answer itself.
            [a, b, flags, ..] if raw.len() >= 12 && flags & 0x80 == 0 => {
                let id = u16::from_be_bytes([*a, *b]);
                encode(&Message::error_msg(id, OpCode::Query, ResponseCode::FormErr), None)
                    .map_or(Action::Ignore, Action::Reply)
            }
            _ => Action::Ignore,
        };
    };
    if query.metadata.message_type != MessageType::Query {
        return Action::Ignore;
    }
    let limit = udp.then(|| udp_limit(&query));
    let fail = |code| encode(&reply_to(&query, code), limit).map_or(Action::Ignore, Action::Reply);
    if query.metadata.op_code != OpCode::Query {
        return fail(ResponseCode::NotImp);
    }
    let [question] = &query.queries[..] else {
        return fail(ResponseCode::FormErr);
    };
    if question.query_class != DNSClass::IN {
        return fail(ResponseCode::Refused);
    }
    let name = question.name.to_ascii().trim_end_matches('.').to_ascii_lowercase();
    match zone.lookup(&name, kind_of(question.query_type)) {
        Lookup::NotOurs => match encode(&reply_to(&query, ResponseCode::ServFail), limit) {
            Some(fallback) => Action::Forward { fallback },
            None => Action::Ignore,
        },
        Lookup::NotYet => fail(ResponseCode::ServFail),
        Lookup::NoSuchName => {
            let mut reply = reply_to(&query, ResponseCode::NXDomain);
            reply.metadata.authoritative = true;
            reply.authorities.extend(soa(zone));
            encode(&reply, limit).map_or(Action::Ignore, Action::Reply)
        }
        Lookup::Found {
            mut answers,
            additionals,
        } => {
            let mut reply = reply_to(&query, ResponseCode::NoError);
            reply.metadata.authoritative = true;
            // The first address is what most clients take.
            let count = answers.len().max(1);
            answers.rotate_left(turn % count);
            let chase = match &answers[..] {
                [
                    Record {
                        data: Data::Cname(target),
                        ..
                    },
                ] if question.query_type != RecordType::CNAME => Some(target.clone()),
                _ => None,
            };
            // The owner is echoed in the client's casing.
            reply
                .answers
                .extend(answers.into_iter().filter_map(|r| wire(question.name.clone(), r.data)));
            if question.query_type == RecordType::SOA && name == zone.domain() {
                reply.answers.extend(soa(zone));
            } else if reply.answers.is_empty() {
                reply.authorities.extend(soa(zone));
            }
            reply.additionals.extend(additionals.into_iter().filter_map(|r| {
                let name = Name::from_ascii(format!("{}.", r.name)).ok()?;
                wire(name, r.data)
            }));
            match chase {
                Some(target) => Action::Chase {
                    partial: Box::new(reply),
                    target,
                    kind: question.query_type,
                },
                None => encode(&reply, limit).map_or(Action::Ignore, Action::Reply),
            }
        }
    }
}

/// Completes a chased alias with the upstream's answer, or sends the alias alone.
pub fn complete(mut partial: Message, upstream: Option<&[u8]>, udp: bool) -> Option<Vec<u8>> {
    if let Some(answer) = upstream.and_then(|raw| Message::from_vec(raw).ok()) {
        partial.answers.extend(answer.answers);
    }
    let limit = udp.then(|| {
        partial.edns.as_ref().map_or(UDP_BYTES_PLAIN, |e| {
            e.max_payload().clamp(UDP_BYTES_PLAIN, UDP_BYTES_MAX)
        })
    });
    encode(&partial, limit)
}

/// A query for `name`.
pub fn query(id: u16, name: &str, kind: RecordType) -> Option<Vec<u8>> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    let name = Name::from_ascii(format!("{}.", name.trim_end_matches('.'))).ok()?;
    message.add_query(hickory_proto::op::Query::query(name, kind));
    message.to_vec().ok()
}

/// Largest datagram that the client takes, within ours.
pub fn udp_limit(query: &Message) -> u16 {
    query.edns.as_ref().map_or(UDP_BYTES_PLAIN, |e| {
        e.max_payload().clamp(UDP_BYTES_PLAIN, UDP_BYTES_MAX)
    })
}

fn reply_to(query: &Message, code: ResponseCode) -> Message {
    let mut reply = Message::new(query.metadata.id, MessageType::Response, query.metadata.op_code);
    reply.metadata.recursion_desired = query.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    reply.metadata.response_code = code;
    reply.add_queries(query.queries.iter().cloned());
    if let Some(theirs) = &query.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(theirs.max_payload().clamp(UDP_BYTES_PLAIN, UDP_BYTES_MAX))
            .set_version(0);
        reply.set_edns(edns);
    }
    reply
}

fn encode(message: &Message, limit: Option<u16>) -> Option<Vec<u8>> {
    let bytes = message.to_vec().ok()?;
    match limit {
        // "Truncated": the client asks again over TCP.
        Some(limit) if bytes.len() > usize::from(limit) => message.truncate().to_vec().ok(),
        _ => Some(bytes),
    }
}

fn kind_of(kind: RecordType) -> Kind {
    match kind {
        RecordType::A => Kind::A,
        RecordType::AAAA => Kind::Aaaa,
        RecordType::SRV => Kind::Srv,
        RecordType::PTR => Kind::Ptr,
        RecordType::CNAME => Kind::Cname,
        RecordType::TXT => Kind::Txt,
        RecordType::SOA => Kind::Soa,
        RecordType::ANY => Kind::Any,
        _ => Kind::Other,
    }
}

fn wire(name: Name, data: Data) -> Option<WireRecord> {
    let fqdn = |n: &str| Name::from_ascii(format!("{}.", n.trim_end_matches('.'))).ok();
    let data = match data {
        Data::A(a) => RData::A(A(a)),
        Data::Aaaa(a) => RData::AAAA(AAAA(a)),
        Data::Srv { weight, port, target } => RData::SRV(SRV::new(0, weight, port, fqdn(&target)?)),
        Data::Ptr(n) => RData::PTR(PTR(fqdn(&n)?)),
        Data::Cname(n) => RData::CNAME(CNAME(fqdn(&n)?)),
        Data::Txt(t) => RData::TXT(TXT::new(vec![t])),
    };
    Some(WireRecord::from_rdata(name, TTL_S, data))
}

/// Says how long a negative answer may be kept; stub resolvers go on with their search list at once.
fn soa(zone: &Zone) -> Option<WireRecord> {
    let name = |prefix: &str| Name::from_ascii(format!("{prefix}{}.", zone.domain())).ok();
    let soa = SOA::new(name("ns.dns.")?, name("hostmaster.")?, 1, 7200, 1800, 86400, TTL_S);
    Some(WireRecord::from_rdata(name("")?, TTL_S, RData::SOA(soa)))
}
