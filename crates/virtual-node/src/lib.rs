//! The virtual kubelet: the kubelet core over container instances.
