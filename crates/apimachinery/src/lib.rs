//! The Kubernetes wire: type table, codecs, patches, selectors, quantities, Status, watch frames. No IO.
