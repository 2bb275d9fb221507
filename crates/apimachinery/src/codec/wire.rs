//! Protobuf's wire format: varints, tags, length-delimited fields.

/// A field's content.
pub(crate) enum Data<'b> {
    Varint(u64),
    Fixed64(u64),
    Fixed32,
    Bytes(&'b [u8]),
}

pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(crate) fn put_uint(out: &mut Vec<u8>, number: u32, value: u64) {
    put_varint(out, u64::from(number) << 3);
    put_varint(out, value);
}

pub(crate) fn put_fixed64(out: &mut Vec<u8>, number: u32, value: u64) {
    put_varint(out, u64::from(number) << 3 | 1);
    out.extend_from_slice(&value.to_le_bytes());
}

pub(crate) fn put_bytes(out: &mut Vec<u8>, number: u32, bytes: &[u8]) {
    put_varint(out, u64::from(number) << 3 | 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// The fields of a message in wire order; ends after the first error.
pub(crate) fn fields(bytes: &[u8]) -> impl Iterator<Item = Result<(u32, Data<'_>), &'static str>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let read = field(&mut rest);
        if read.is_err() {
            rest = &[];
        }
        Some(read)
    })
}

fn field<'b>(rest: &mut &'b [u8]) -> Result<(u32, Data<'b>), &'static str> {
    let tag = varint(rest)?;
    let number = u32::try_from(tag >> 3).map_err(|_| "field number too large")?;
    if number == 0 {
        return Err("field number is zero");
    }
    let data = match tag & 7 {
        0 => Data::Varint(varint(rest)?),
        1 => {
            let bytes = take(rest, 8)?;
            Data::Fixed64(u64::from_le_bytes(bytes.try_into().map_err(|_| "short fixed64")?))
        }
        2 => {
            let length = usize::try_from(varint(rest)?).map_err(|_| "length too large")?;
            Data::Bytes(take(rest, length)?)
        }
        5 => {
            take(rest, 4)?;
            Data::Fixed32
        }
        _ => return Err("unsupported wire type"),
    };
    Ok((number, data))
}

pub(crate) fn varint(rest: &mut &[u8]) -> Result<u64, &'static str> {
    let mut value = 0u64;
    for shift in (0..70).step_by(7) {
        let (first, tail) = rest.split_first().ok_or("ends within a varint")?;
        *rest = tail;
        if shift == 63 && *first > 1 {
            return Err("varint over 64 bits");
        }
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("varint over 64 bits")
}

fn take<'b>(rest: &mut &'b [u8], length: usize) -> Result<&'b [u8], &'static str> {
    let (bytes, tail) = rest.split_at_checked(length).ok_or("ends within a field")?;
    *rest = tail;
    Ok(bytes)
}
