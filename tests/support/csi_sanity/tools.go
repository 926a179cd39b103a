//go:build tools

// Package csisanity pins the version of csi-sanity, which the tests build and run.
package csisanity

import _ "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity"
