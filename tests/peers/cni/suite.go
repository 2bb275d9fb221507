//go:build deps

// Package cni keeps what the reference plug-ins' integration suite imports in go.mod and go.sum: the suite is a test of
// another module, whose imports `go mod tidy` does not follow.
package cni

import (
	_ "github.com/onsi/ginkgo/v2"
	_ "github.com/onsi/gomega"
	_ "github.com/onsi/gomega/gbytes"
	_ "github.com/onsi/gomega/gexec"
)
